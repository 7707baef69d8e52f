"""Numbers of numpy, and lists, are taken where Python's numbers and tuples are wanted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation
from helpers.small_model import make_pipe
from torch import nn

from perfusion_pytorch import (
    InputCovariance,
    Rank1EditModule,
    calculate_input_covariance,
    get_finetune_optimizer,
    get_list_concepts,
    load_concept,
    set_concepts,
    train_concept,
)
from perfusion_pytorch.arguments import beartype, plain
from perfusion_pytorch.pipelines.parts import loaded_on
from perfusion_pytorch.training.options import TrainingOptions

CAR = Path(__file__).parents[1] / "examples" / "shapes" / "concepts" / "car.safetensors"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.array(0.5), 0.5),
        ([np.int32(1), 2], [1, 2]),
        ((np.float16(0.5),), (0.5,)),
        ({"<a>": np.float32(0.25)}, {"<a>": 0.25}),
    ],
)
def test_numbers_become_plain(value, expected):
    assert plain(value) == expected and json.dumps(plain(value)) == json.dumps(expected)


def test_all_else_stays_the_very_same():
    for value in (np.ones(2), torch.tensor(1.0), ["a", Path("b")], ("a",), "a", None, True):
        assert plain(value) is value


def test_gates_of_concepts():
    pipe = make_pipe()
    car = load_concept(pipe, CAR)
    set_concepts(pipe, np.array([car]), beta=np.float32(0.25), temperature={car: np.float64(0.125)})
    assert loaded_on(pipe).concepts[car].eval_gate == (0.25, 0.125)
    assert get_list_concepts(pipe) == [car]


def test_options_of_a_layer():
    layer = Rank1EditModule(
        nn.Linear(2, 3), num_concepts=np.int64(2), eval_beta=np.float32(0.5), gates_removal=[True, False]
    )
    assert layer.eval_beta.tolist() == [0.5, 0.5] and layer.gates_removal == (True, False)
    assert type(layer.num_concepts) is int


def test_a_covariance(tmp_path):
    estimate = calculate_input_covariance(
        ["a"],
        lambda _: (torch.ones(1, 2, 3), torch.ones(1, 2)),
        batch_size=np.int64(4),
        ridge=np.float32(0.5),
    )
    estimate.save(tmp_path / "c")
    loaded = InputCovariance.load(tmp_path / "c")
    assert (loaded.num_tokens, loaded.ridge) == (2, 0.5)
    assert InputCovariance(torch.eye(2), num_tokens=np.int64(3)).num_tokens == 3


def test_an_optimizer():
    layer = Rank1EditModule(nn.Linear(2, 3), C=torch.eye(2))
    (group,) = get_finetune_optimizer(layer, lr_output=1, betas=[np.float32(0.5), 0.75]).param_groups
    assert group["lr"] == 1 and group["betas"] == (0.5, 0.75)


def test_options_of_training(monkeypatch):
    """They reach the options as Python's numbers, which a checkpoint can record."""
    from perfusion_pytorch.training import train

    seen = []

    def catch(**options):
        seen.append(TrainingOptions(**options))
        raise StopIteration

    monkeypatch.setattr(train, "TrainingOptions", catch)
    with pytest.raises(StopIteration):
        train_concept(
            make_pipe(),
            "p",
            token="<car-1>",
            superclass="car",
            output_dir="o",
            seed=np.int64(3),
            learning_rate=np.float32(0.5),
            max_train_steps=np.int32(20),
        )
    (options,) = seen
    assert json.loads(json.dumps(options.recorded))["seed"] == 3 and options.learning_rate == 0.5


def test_what_is_not_a_number_is_refused_still():
    for wrong in ("0.5", torch.tensor([0.5, 1.0]), np.ones(2)):
        with pytest.raises(BeartypeCallHintParamViolation, match="parameter ridge="):
            InputCovariance(torch.eye(2), ridge=wrong)
    with pytest.raises(BeartypeCallHintParamViolation, match="parameter num_tokens="):
        InputCovariance(torch.eye(2), num_tokens=np.float32(2.0))


def test_names_signature_and_documentation_stay():
    @beartype
    def half(number: float) -> float:
        """Halve."""
        return number / 2

    assert (half.__name__, half.__doc__, half(1)) == ("half", "Halve.", 0.5)
    assert half.__wrapped__.__annotations__ == {"number": float, "return": float}


def test_the_concept_of_a_layer():
    layer = Rank1EditModule(nn.Linear(2, 3), C=torch.eye(2), num_concepts=2)
    for concept in (np.int64(0), 1):
        layer(torch.randn(1, 1, 2), torch.randn(1, 1, 2), torch.tensor([0]), concept_id=concept)
    assert layer.initialized.all()
    layer.eval()
    text_enc = torch.randn(1, 2, 2)
    for given, expected in ((np.int64(1), 1), ([1, 0], (1, 0)), ((1, 0), (1, 0))):
        assert torch.equal(layer(text_enc, concept_id=given), layer(text_enc, concept_id=expected))
    for wrong in ("0", 1.0, torch.tensor(1), ["0"]):
        with pytest.raises(ValueError, match="`concept_id` must be a whole number, several in"):
            layer(text_enc, concept_id=wrong)
