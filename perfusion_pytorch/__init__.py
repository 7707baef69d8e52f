"""Key-locked rank-1 editing for text-to-image personalization (Perfusion, Tewel et al. 2023), as PyTorch layers."""

from perfusion_pytorch.covariance import InputCovariance, calculate_input_covariance
from perfusion_pytorch.embedding import EmbeddingWrapper, add_concept_token_, tokenize_with_concept
from perfusion_pytorch.functional import concept_dual, concept_similarity, rank1_edit_delta, rank1_update
from perfusion_pytorch.loss import loss_fn_weighted_by_mask
from perfusion_pytorch.optimizer import get_finetune_optimizer, get_finetune_parameters
from perfusion_pytorch.rank1_edit import Rank1EditModule
from perfusion_pytorch.wiring import concept_inputs, unwrap_cross_attentions_, wrap_cross_attentions_

__all__ = [
    "EmbeddingWrapper",
    "InputCovariance",
    "Rank1EditModule",
    "add_concept_token_",
    "calculate_input_covariance",
    "concept_dual",
    "concept_inputs",
    "concept_similarity",
    "get_finetune_optimizer",
    "get_finetune_parameters",
    "loss_fn_weighted_by_mask",
    "rank1_edit_delta",
    "rank1_update",
    "tokenize_with_concept",
    "unwrap_cross_attentions_",
    "wrap_cross_attentions_",
]
