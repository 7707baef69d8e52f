"""The package as its users see it: names, signatures, examples, imports."""

import doctest
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import perfusion_pytorch

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(perfusion_pytorch.__path__, "perfusion_pytorch.")
    if not module.name.endswith("__main__")
)

# Names, kinds and defaults of the parameters of all public names.
SIGNATURES = {
    "Concept": (
        "(token, superclass, base_model, embeddings, concept_input, concept_dual, superclass_input, "
        "concept_norm, outputs, train_gate=(0.75, 0.1), eval_gate=(0.7, 0.15), gates_removal=False, "
        "origin=<factory>)"
    ),
    "Concept.has_equal_tensors": "(self, other)",
    "Concept.load": "(path)",
    "Concept.of_model": "(model, *, token, superclass, embeddings, concept_id=0)",
    "Concept.save": "(self, path, *, dtype=torch.float16)",
    "EmbeddingWrapper": "(embedding, concept_ids, superclass_ids)",
    "EmbeddingWrapper.with_superclass": "(self, ids, concept=0)",
    "InputCovariance": "(covariance, *, num_tokens=1, ridge=0.0)",
    "InputCovariance.empty": "(dim, *, ridge=0.0)",
    "InputCovariance.inverse": "(self, device='cpu', dtype=torch.float32)",
    "InputCovariance.load": "(path)",
    "InputCovariance.merge": "(self, other)",
    "InputCovariance.save": "(self, path)",
    "InputCovariance.update": "(self, encodings, mask=None)",
    "Rank1EditModule": (
        "(key_or_values_proj, *, C=None, is_key_proj=False, num_finetune_prompts=1, num_concepts=1, "
        "text_seq_len=None, input_decay=0.99, train_beta=0.75, train_temperature=0.1, eval_beta=0.7, "
        "eval_temperature=0.15, frac_gradient_concept_embed=0.1, gates_removal=False)"
    ),
    "Rank1EditModule.forward": (
        "(self, text_enc, text_enc_with_superclass=None, concept_indices=None, *, "
        "superclass_indices=None, prompt_ids=None, concept_id=None)"
    ),
    "add_concept_token_": "(text_encoder, tokenizer, token, superclass)",
    "apply_rank1_edit": (
        "(text_enc, weight, concept_input, concept_dual, concept_output, beta, temperature, active=None, "
        "gates_removal=False)"
    ),
    "calculate_input_covariance": "(texts, encode, *, batch_size=32, ridge=0.0, progress=None)",
    "concept_dual": "(concept_input, inverse_covariance)",
    "concept_gates": "(pipe, *, beta=None, temperature=None)",
    "concept_inputs": (
        "(model, *, text_enc_with_superclass, concept_indices, superclass_indices=None, "
        "prompt_ids=None, concept_id=0, concept_gradient=None)"
    ),
    "concept_similarity": "(text_enc, concept_dual)",
    "delete_concepts": "(pipe, names)",
    "disable_concepts": "(pipe)",
    "enable_concepts": "(pipe)",
    "evaluate_concepts": (
        "(pipe, files, images, *, output_dir, prompts='objects', superclass=None, words=None, "
        "betas=(0.3, 0.5, 0.7, 0.9), scales=(0.5, 0.75, 1.0, 1.25), num_images_per_prompt=2, seed=0, "
        "num_inference_steps=None, guidance_scale=None, resolution=None, batch_size=1, "
        "clip_model='openai/clip-vit-base-patch32', dino_model='facebook/dinov2-small', checkers=(), "
        "write=False, progress=True)"
    ),
    "get_active_concepts": "(pipe)",
    "get_finetune_optimizer": (
        "(*models, lr_output=0.03, lr_embedding=0.006, betas=(0.9, 0.999), weight_decay=0.0)"
    ),
    "get_finetune_parameters": "(*models)",
    "get_list_concepts": "(pipe)",
    "global_key_lock": "(pipe)",
    "load_concept": "(pipe, path, *, token=None, revision=None)",
    "loss_fn_weighted_by_mask": "(prediction, target, mask)",
    "make_key_value_proj_rank1_edit_modules_": (
        "(cross_attention, *, C, key_proj_name=None, value_proj_name=None, **layer_options)"
    ),
    "merge_rank1_edit_modules": "(*modules)",
    "overlap_condition": "(concept_input, concept_dual)",
    "push_concept": "(path, name, *, private=False, license=None, pictures=())",
    "rank1_update": "(weight, concept_input, concept_dual, concept_output)",
    "read_picture_facts": "(path)",
    "remove_concept_token_": "(text_encoder, tokenizer, token)",
    "save_concept": "(pipe, path, *, name=None, dtype=torch.float16)",
    "set_concepts": "(pipe, names, *, beta=None, temperature=None)",
    "split_concepts": (
        "(text_enc, concept_input, concept_dual, beta, temperature, active=None, gates_removal=False, "
        "joint=None)"
    ),
    "token_similarities": "(model, tokenizer, encode, prompts)",
    "tokenize_with_concept": "(tokenizer, prompts, token)",
    "train_concept": (
        "(pipe, images, *, token, superclass, output_dir, masks=None, use_masks=True, mask_model=None, "
        "captions=None, templates=None, covariance=None, resolution=None, center_crop=True, "
        "max_train_steps=500, embedding_steps=None, train_batch_size=16, gradient_accumulation_steps=1, "
        "gradient_checkpointing=False, mixed_precision=None, learning_rate=0.04, "
        "embedding_learning_rate=0.04, relative_learning_rates=True, lr_scheduler='cosine', "
        "lr_warmup_steps=0, adam_beta1=0.9, "
        "adam_beta2=0.999, adam_weight_decay=0.0, adam_epsilon=1e-08, max_grad_norm=None, "
        "gates_removal=True, train_beta=0.5, train_temperature=0.05, eval_beta=0.5, eval_temperature=0.05, "
        "input_decay=0.99, frac_gradient_concept_embed=0.1, timestep_power=1.0, seed=0, "
        "checkpointing_steps=100, checkpoints_total_limit=None, resume_from_checkpoint=None, "
        "validation_prompt=None, num_validation_images=4, validation_steps=100, report_to=None, "
        "logging_dir='logs', push_to_hub=None, progress=True)"
    ),
    "unload_concepts": "(pipe)",
    "unwrap_cross_attentions_": "(model)",
    "wrap_cross_attentions_": "(model, *, C, key_names=None, value_names=None, **layer_options)",
}


def signature_of(name):
    target = perfusion_pytorch
    for part in name.split("."):
        target = getattr(target, part)
    signature = inspect.signature(target)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def test_public_names_are_pinned_and_sorted():
    assert perfusion_pytorch.__all__ == sorted(name for name in SIGNATURES if "." not in name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_pinned(name):
    assert signature_of(name) == SIGNATURES[name]


@pytest.mark.parametrize("name", perfusion_pytorch.__all__)
def test_public_names_are_documented(name):
    first, *_ = inspect.getdoc(getattr(perfusion_pytorch, name)).splitlines()
    assert first[0].isupper() and first.endswith((".", ":", ")"))


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module):
    results = doctest.testmod(importlib.import_module(module), extraglobs={"torch": torch, "nn": nn})
    assert results.failed == 0


def test_the_pure_modules_have_examples():
    finder = doctest.DocTestFinder()
    for module in (
        "layers.covariance",
        "embedding",
        "layers.functional",
        "loss",
        "optimizer",
        "layers.rank1_edit",
        "wiring",
    ):
        assert any(
            test.examples for test in finder.find(importlib.import_module(f"perfusion_pytorch.{module}"))
        ), module


def test_the_version_is_stated_once():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", perfusion_pytorch.__version__)
    assert "version=VERSION" in setup
    release, _, _ = perfusion_pytorch.__version__.partition(".dev")
    assert release in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_oldest_versions_that_a_workflow_installs_are_the_lower_bounds():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    run_time = setup.split("DOCS =")[0] + setup.split("install_requires=")[1].split("]")[0]
    bounds = dict(re.findall(r'"(\w+)>=([\d.]+)"', run_time))
    constraints = (ROOT / ".github" / "oldest.txt").read_text(encoding="utf-8")
    pinned = {
        name: version.removesuffix(".*") for name, version in re.findall(r"^(\w+)==(.+)$", constraints, re.M)
    }
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8")
    (pinned["torch"],) = set(re.findall(r"torch==([\d.]+)\.\*", workflow))
    assert pinned == bounds


def test_a_test_process_uses_one_thread():
    """Also as one of several workers, which would otherwise slow each other down."""
    assert torch.get_num_threads() == 1


def test_importing_needs_no_extra_and_prints_nothing():
    program = """
import sys

EXTRAS = ("accelerate", "diffusers", "gradio", "matplotlib", "peft", "PIL", "tqdm", "transformers")

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Refuse())
try:
    import transformers
    raise SystemExit("not blocked")
except ImportError:
    pass
import torch
from torch import nn
import perfusion_pytorch as p
layer = p.Rank1EditModule(nn.Linear(4, 3), C=torch.eye(4))
layer(torch.randn(1, 2, 4), torch.randn(1, 2, 4), torch.tensor([1])).sum().backward()
"""
    root = Path(perfusion_pytorch.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=100
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
