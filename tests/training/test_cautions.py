"""Settings that cannot work are warned of before the first step; those that can are not."""

import math
import re
import warnings

import pytest
import torch
from helpers.tiny_pipes import IMAGES, SETTLED, covariance_of, options_for, tiny_pipe

from perfusion_pytorch import InputCovariance, train_concept
from perfusion_pytorch.training.cautions import gate, warn_of_covariance, warn_of_settings
from perfusion_pytorch.training.options import PAPER, TrainingOptions

GIVEN = {"images": IMAGES, "token": "<car-1>", "superclass": "car", "output_dir": "o"}


def told(**options):
    """The warnings about options, beside the defaults."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_settings(tiny_pipe(), TrainingOptions(**GIVEN | options))
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    "options", [{}, SETTLED, dict(PAPER), {"max_train_steps": 1}, {"superclass": "red car"}]
)
def test_usual_settings_are_not_warned_of(options):
    assert told(**options) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_beta": 5}, r"`train_beta` 5 .* nearly shuts the gate .* \(to 1.8e-35 of 1\), .* trained"),
        ({"train_beta": 1.5, "train_temperature": 0.1}, r"`train_beta` 1.5 .* \(to 6.7e-03 of 1\)"),
        ({"eval_beta": 1.2}, r"`eval_beta` 1.2 with `eval_temperature` 0.05 nearly shuts .* in pictures"),
        ({"train_beta": -1.0}, r"`train_beta` -1 .* opens the gate for every word \(1.00 of 1"),
        ({"learning_rate": 0}, r"`learning_rate` is 0, so that the outputs will hardly change"),
        ({"embedding_learning_rate": 1e-6}, r"`embedding_learning_rate` is 1e-06, so that the embedding"),
        ({"learning_rate": 4}, r"`learning_rate` is 4: each step moves the outputs by more than the size"),
        (
            {"learning_rate": 4, "relative_learning_rates": False},
            r"`learning_rate` is 4: each step moves the outputs by more than 1,",
        ),
        ({"lr_warmup_steps": 250}, r"`lr_warmup_steps` is 250, but a phase of this run has 250 steps"),
        ({"max_train_steps": 8000, "checkpointing_steps": None}, r"a run of 8000 steps that is killed must"),
        ({"max_train_steps": 1000, "checkpointing_steps": 5000}, r"`checkpointing_steps` is 5000"),
        ({"validation_prompt": ["a <car-1>", "a car"]}, r"hold the token <car-1>, but not so \['a car'\]"),
        ({"superclass": "zebra"}, r"its tokenizer splits 'zebra' into 'z', 'e', 'b', 'ra</w>'"),
        ({"superclass": "red xqzrt"}, r"its tokenizer splits 'xqzrt' into 'x', 'q', 'z', 'r', 't</w>'"),
        ({"resolution": 64}, r"`resolution` is 64, but the model makes pictures of 16 pixels"),
        ({"resolution": 6}, r"`resolution` is 6, but the model"),
    ],
)
def test_settings_that_cannot_work_are_named(options, message):
    (line,) = told(**options)
    assert re.search(message, line), line


def test_the_gate_is_the_layers():
    for r, beta, temperature in ((1.0, 0.5, 0.05), (0.0, 0.5, 0.05), (0.3, 0.2, 0.7)):
        expected = torch.sigmoid(torch.tensor((r - beta) / temperature, dtype=torch.float64)).item()
        assert gate(r, beta, temperature) == pytest.approx(expected, rel=1e-12)
    assert gate(1.0, 1e6, 1e-6) == 0 and gate(1.0, -1e6, 1e-6) == 1 and not math.isnan(gate(1.0, 1.0, 1e-9))


def test_a_covariance_of_one_caption_is_named(tmp_path):
    matrix = covariance_of().matrix
    few = InputCovariance(matrix, num_tokens=77)
    with pytest.warns(UserWarning, match="of 77 tokens, which is too few for 12 features") as caught:
        train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path, covariance=lambda: few))
    assert {w.filename for w in caught if "too few" in str(w.message)} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_covariance(InputCovariance(matrix, num_tokens=120))
        warn_of_covariance(InputCovariance(matrix))  # a matrix, of nobody knows how many


def test_warnings_come_before_the_covariance_is_computed(tmp_path):
    def stop():
        raise MemoryError

    with pytest.warns(UserWarning, match="nearly shuts the gate"), pytest.raises(MemoryError):
        train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path, train_beta=5, covariance=stop))
