"""Perfusion (Tewel et al. 2023): key-locked rank-1 editing for text-to-image models, as PyTorch layers."""

from perfusion_pytorch.early_interrupts import ends_at_ctrl_c

with ends_at_ctrl_c():  # torch takes seconds to import
    from perfusion_pytorch.concept import Concept
    from perfusion_pytorch.concept_inputs import concept_inputs
    from perfusion_pytorch.diagnostics import token_similarities
    from perfusion_pytorch.embedding import EmbeddingWrapper
    from perfusion_pytorch.evaluation.evaluate import evaluate_concepts
    from perfusion_pytorch.grids import read_picture_facts
    from perfusion_pytorch.layers.covariance import InputCovariance, calculate_input_covariance
    from perfusion_pytorch.layers.functional import (
        apply_rank1_edit,
        concept_similarity,
        overlap_condition,
        rank1_update,
        split_concepts,
    )
    from perfusion_pytorch.layers.merge import merge_rank1_edit_modules
    from perfusion_pytorch.layers.metric import concept_dual
    from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
    from perfusion_pytorch.loss import loss_fn_weighted_by_mask
    from perfusion_pytorch.optimizer import get_finetune_optimizer, get_finetune_parameters
    from perfusion_pytorch.pipelines.key_lock import global_key_lock
    from perfusion_pytorch.pipelines.verbs import (
        concept_gates,
        delete_concepts,
        disable_concepts,
        enable_concepts,
        get_active_concepts,
        get_list_concepts,
        load_concept,
        save_concept,
        set_concepts,
        unload_concepts,
    )
    from perfusion_pytorch.push import push_concept
    from perfusion_pytorch.token_wiring import add_concept_token_, remove_concept_token_
    from perfusion_pytorch.tokens import tokenize_with_concept
    from perfusion_pytorch.training.train import train_concept
    from perfusion_pytorch.wiring import (
        make_key_value_proj_rank1_edit_modules_,
        unwrap_cross_attentions_,
        wrap_cross_attentions_,
    )

__version__ = "1.0.0.dev0"

__all__ = [
    "Concept",
    "EmbeddingWrapper",
    "InputCovariance",
    "Rank1EditModule",
    "add_concept_token_",
    "apply_rank1_edit",
    "calculate_input_covariance",
    "concept_dual",
    "concept_gates",
    "concept_inputs",
    "concept_similarity",
    "delete_concepts",
    "disable_concepts",
    "enable_concepts",
    "evaluate_concepts",
    "get_active_concepts",
    "get_finetune_optimizer",
    "get_finetune_parameters",
    "get_list_concepts",
    "global_key_lock",
    "load_concept",
    "loss_fn_weighted_by_mask",
    "make_key_value_proj_rank1_edit_modules_",
    "merge_rank1_edit_modules",
    "overlap_condition",
    "push_concept",
    "rank1_update",
    "read_picture_facts",
    "remove_concept_token_",
    "save_concept",
    "set_concepts",
    "split_concepts",
    "token_similarities",
    "tokenize_with_concept",
    "train_concept",
    "unload_concepts",
    "unwrap_cross_attentions_",
    "wrap_cross_attentions_",
]
