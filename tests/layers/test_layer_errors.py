"""What a layer refuses, and that a refused call changes nothing."""

import warnings

import pytest
import torch
from helpers.layers import assert_same_state, inputs, make_layer, state_of, trained
from torch import nn

from perfusion_pytorch import Rank1EditModule


def test_the_references_usage_runs_and_warns():
    """A random matrix is no covariance: it is symmetrised, warned about, and used."""
    with pytest.warns(UserWarning, match="not positive definite"):
        wrapped = Rank1EditModule(
            nn.Linear(512, 1024, bias=False),
            C=torch.randn(512, 512),
            is_key_proj=True,
            num_finetune_prompts=32,
        )
    text_enc = torch.randn(4, 256, 512)
    text_enc_with_superclass = torch.randn(4, 256, 512)
    concept_ids = torch.randint(0, 256, (4,))
    keys = wrapped(text_enc, text_enc_with_superclass, concept_ids)
    assert keys.shape == (4, 256, 1024) and keys.isfinite().all()
    assert wrapped.eval()(text_enc).shape == (4, 256, 1024)


def test_a_good_covariance_does_not_warn(covariance):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_layer(covariance(16))(*inputs())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_finetune_prompts": 0}, "`num_finetune_prompts` must be at least 1, got 0"),
        ({"num_concepts": 0}, "`num_concepts` must be at least 1, got 0"),
        ({"input_decay": 1.0}, r"`input_decay` must be in \[0, 1\), got 1.0"),
        ({"input_decay": -0.1}, "`input_decay` must be"),
        ({"train_temperature": 0}, "`train_temperature` must be above 0 and finite, got 0"),
        ({"eval_temperature": float("nan")}, "`eval_temperature` must be above 0 and finite, got nan"),
        ({"train_temperature": float("inf")}, "`train_temperature` must be above 0 and finite, got inf"),
        ({"train_beta": float("nan")}, "`train_beta` must be finite, got nan"),
        ({"eval_beta": float("inf")}, "`eval_beta` must be finite, got inf"),
        ({"text_seq_len": -1}, "`text_seq_len` must be at least 1, got -1"),
        ({"frac_gradient_concept_embed": 1.5}, r"`frac_gradient_concept_embed` must be in \[0, 1\], got 1.5"),
        ({"C": torch.eye(3)}, r"`C` must have shape \(16, 16\).*got \(3, 3\)"),
        ({"C": torch.ones(16, 16)}, "must be invertible"),
        ({"C": torch.full((16, 16), float("nan"))}, "must be finite"),
        ({"C": torch.ones(16, 8)}, "must be square"),
    ],
)
def test_construction_errors_leave_the_projection_alone(options, message):
    plain = nn.Linear(16, 12)
    with pytest.raises(ValueError, match=message):
        Rank1EditModule(plain, **{"C": torch.eye(16), **options})
    assert plain.weight.requires_grad and plain.bias.requires_grad


@pytest.mark.parametrize("wrong", [nn.Conv1d(4, 4, 1), nn.Identity(), nn.Bilinear(4, 4, 4)])
def test_only_plain_linear_layers_are_wrapped(wrong):
    with pytest.raises(ValueError, match=f"must be a plain nn.Linear, got {type(wrong).__name__}"):
        Rank1EditModule(wrong, C=torch.eye(4))


def test_a_wrapped_layer_is_not_wrapped_again(covariance):
    with pytest.raises(ValueError, match=r"must be a plain nn\.Linear, got Rank1EditModule"):
        Rank1EditModule(make_layer(covariance(16)), C=covariance(16))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_enc": torch.zeros(4, 6, 8)}, r"`text_enc` must have shape \(b, n, 16\).*got \(4, 6, 8\)"),
        ({"text_enc": torch.zeros(3, 6, 16)}, "`text_enc` must have shape"),
        ({"text_enc": torch.zeros(6, 16)}, "`text_enc` must have shape"),
        (
            {"text_enc_with_superclass": torch.zeros(4, 6, 8)},
            r"`text_enc_with_superclass` must have shape \(b, n, 16\)",
        ),
        ({"text_enc_with_superclass": torch.zeros(6, 16)}, "`text_enc_with_superclass` must have shape"),
        ({"text_enc_with_superclass": torch.zeros(4, 3, 16)}, "`text_enc_with_superclass` must have shape"),
        (
            {"text_enc_with_superclass": None},
            "`text_enc_with_superclass` must be given in the first training call",
        ),
        (
            {"concept_indices": torch.zeros(3, dtype=torch.long)},
            r"`concept_indices` must have shape \(4,\).*got \(3,\)",
        ),
        ({"concept_indices": torch.zeros(4, 1, dtype=torch.long)}, "`concept_indices` must have shape"),
        ({"concept_indices": torch.zeros(4)}, "`concept_indices` must hold integers, got torch.float32"),
        ({"concept_indices": torch.ones(4, dtype=torch.bool)}, "`concept_indices` must hold integers"),
        (
            {"concept_indices": torch.tensor([0, 1, 2, 6])},
            "`concept_indices` must be from -1 to 5, got values from 0 to 6",
        ),
        ({"concept_indices": torch.tensor([0, 1, 2, -2])}, "`concept_indices` must be from -1 to 5"),
        ({"superclass_indices": torch.tensor([0, 1, 2, 6])}, "`superclass_indices` must be from -1 to 5"),
        ({"superclass_indices": torch.tensor([0, 1, 2])}, r"`superclass_indices` must have shape \(4,\)"),
        (
            {"superclass_indices": torch.tensor([0, 1, 2, -1])},
            "`superclass_indices` must be at least 0 wherever",
        ),
        (
            {"prompt_ids": torch.tensor([0, 1, 2, 0])},
            "`prompt_ids` must be from 0 to 1.*`num_finetune_prompts`",
        ),
        ({"prompt_ids": torch.tensor([0, 1, 0, -1])}, "`prompt_ids` must be from 0 to 1"),
        ({"prompt_ids": torch.zeros(4)}, "`prompt_ids` must hold integers"),
        ({"concept_id": 2}, "`concept_id` must be different concepts from 0 to 1, got 2"),
        ({"concept_id": -1}, "`concept_id` must be different concepts from 0 to 1, got -1"),
        ({"concept_id": (0, 1)}, "`concept_id`"),
        ({"concept_id": ()}, r"`concept_id` must be one concept in a training call, got \(\)"),
        (
            {"concept_indices": [0, 1, 2, 3]},
            "`concept_indices` must be a tensor of integers, one a row, got list",
        ),
        ({"prompt_ids": [0, 1, 1, 0]}, "`prompt_ids` must be a tensor of integers, one a row, got list"),
        (
            {"concept_indices": None},
            "`concept_indices` must be given along with `text_enc_with_superclass`, got None",
        ),
        ({"text_enc": torch.zeros(16)}, r"`text_enc` must have shape .* got \(16,\)"),
        (
            {"text_enc": torch.zeros(4, 6, 16, dtype=torch.float64)},
            "`text_enc` must be of torch.float32, .* got torch.float64",
        ),
        (
            {"text_enc": torch.full((4, 6, 16), float("nan"))},
            "`text_enc` must be finite at the concept's token",
        ),
        (
            {"text_enc_with_superclass": torch.full((4, 6, 16), float("inf"))},
            "`text_enc_with_superclass` must be finite at",
        ),
    ],
)
@pytest.mark.parametrize("is_key_proj", [True, False])
def test_refused_training_calls_change_nothing(covariance, is_key_proj, change, message):
    layer = make_layer(covariance(16), is_key_proj=is_key_proj, num_concepts=2, num_finetune_prompts=2)
    before = state_of(layer)
    text_enc, superclass, _ = inputs()
    call = {
        "text_enc": text_enc,
        "text_enc_with_superclass": superclass,
        "concept_indices": torch.tensor([0, 5, 2, 3]),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        layer(**call)
    assert_same_state(layer, before)
    assert not layer.recent_calls


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_quantised_weights_are_refused(dtype):
    proj = nn.Linear(16, 12, bias=False)
    proj.weight = nn.Parameter(torch.ones(12, 16, dtype=dtype), requires_grad=False)
    with pytest.raises(
        ValueError,
        match=f"`key_or_values_proj` must have a floating point nn.Parameter .* got Parameter of {dtype}",
    ):
        Rank1EditModule(proj, C=None)


@pytest.mark.parametrize("concept_id", [3, -1, (0, 0), (0, 3)])
def test_refused_inference_calls(covariance, concept_id):
    layer = trained(covariance(16), 3)
    with pytest.raises(ValueError, match="`concept_id` must be different concepts from 0 to 2"):
        layer(torch.randn(1, 2, 16), concept_id=concept_id)


def test_the_length_of_text_encodings_is_checked_where_it_is_given(covariance):
    layer = make_layer(covariance(16), text_seq_len=6)
    layer(*inputs())
    with pytest.raises(ValueError, match=r"`text_enc` must have shape \(b, 6, 16\).*got \(4, 5, 16\)"):
        layer(*inputs(n=5))


def test_training_without_a_covariance_is_an_error():
    layer = make_layer(None)
    before = state_of(layer)
    with pytest.raises(RuntimeError, match="C=None"):
        layer(*inputs())
    assert_same_state(layer, before)
    assert layer.eval()(*inputs()).shape == (4, 6, 12)


def test_a_wrong_type_is_an_error(covariance):
    from beartype.roar import BeartypeCallHintParamViolation

    with pytest.raises(BeartypeCallHintParamViolation, match="num_concepts"):
        make_layer(covariance(16), num_concepts="2")
