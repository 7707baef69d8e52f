"""The options of `train_concept`: defaults, ranges, what is recorded, and what is refused."""

import inspect
import re
import warnings
from dataclasses import FrozenInstanceError
from typing import get_type_hints

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation
from helpers.small_model import assert_unchanged, state_of
from helpers.tiny_pipes import (
    IMAGES,
    options_for,
    tiny_pipe,
)

from perfusion_pytorch import Rank1EditModule, train_concept
from perfusion_pytorch.training.options import (
    OPTION_DEFAULTS,
    OPTION_NAMES,
    OPTION_RANGES,
    OPTION_TYPES,
    PAPER,
    TrainingOptions,
)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_train_steps": 0}, "`max_train_steps` must be at least 1, got 0"),
        ({"checkpointing_steps": 0}, "`checkpointing_steps` must be at least 1, or None, got 0"),
        ({"learning_rate": float("inf")}, "`learning_rate` must be at least 0 and finite"),
        ({"lr_warmup_steps": -1}, "`lr_warmup_steps` must be at least 0"),
        ({"lr_scheduler": "steep"}, "`lr_scheduler` must be one of constant, .*, got 'steep'"),
        ({"max_grad_norm": 0}, "`max_grad_norm` must be above 0, or None"),
        ({"adam_beta2": 1.0}, "`adam_beta2` must be at least 0 and below 1"),
        ({"adam_epsilon": -1e-8}, "`adam_epsilon` must be at least 0 and finite"),
        ({"timestep_power": 0}, "`timestep_power` must be above 0 and finite"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` must be 'no', 'fp16', 'bf16' or None, got 'fp8'"),
        ({"mixed_precision": "fp16"}, "must be 'no' or 'bf16' on a CPU, got 'fp16'"),
        (
            {"report_to": "pigeon"},
            "`report_to` must be one of .*tensorboard, .*, got 'pigeon'. Installed are",
        ),
        ({"mask_model": "CIDAS/clipseg"}, "cannot be given along with `masks`"),
        ({"resolution": 17}, "`resolution` must be a multiple of 2 pixels, got 17"),
        ({"token": "<Car>"}, "`token` must be one lower-case word"),
        ({"superclass": ""}, "`superclass` must be one or more words"),
        ({"templates": ["a photo"]}, "`templates` must be"),
        ({"captions": ["a house"] * 3}, "A caption must name the concept"),
        ({"captions": ["a red " * 20 + "car"] * 3}, "was lost from the prompt"),
        (
            {"validation_prompt": ["a car", "a <Car-1>"]},
            "must be written '<car-1>', in lower case, got the prompt 'a <Car-1>'",
        ),
        ({"validation_prompt": "a red " * 20 + "<car-1>"}, "was lost from the prompt"),
        ({"train_temperature": 0}, "`train_temperature` must be above 0"),
        ({"covariance": torch.eye(5)}, "takes 12 features, but the covariance is of 5"),
    ],
)
def test_what_is_refused(options, message, tmp_path):
    pipe, computed = tiny_pipe(), []
    state = state_of(pipe)
    with pytest.raises(ValueError, match=message):
        train_concept(
            pipe, IMAGES, **options_for(tmp_path, **{"covariance": lambda: computed.append(1)} | options)
        )
    assert_unchanged(pipe, state)
    assert not list(tmp_path.iterdir()) and not computed


OPTIONS = {"images": "pictures", "token": "<car-1>", "superclass": "car", "output_dir": "run"}


def test_options_are_the_arguments_of_train_concept():
    parameters = inspect.signature(train_concept).parameters
    assert tuple(parameters) == ("pipe", *OPTION_NAMES)
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    assert defaults == OPTION_DEFAULTS
    types = get_type_hints(train_concept)
    assert {name: types[name] for name in OPTION_NAMES} == OPTION_TYPES


def test_options_cannot_be_changed():
    options = TrainingOptions(**OPTIONS)
    with pytest.raises(FrozenInstanceError):
        options.seed = 1


def test_the_papers_settings_of_the_layer_are_its_defaults():
    layer = inspect.signature(Rank1EditModule).parameters
    options = TrainingOptions(**OPTIONS, **PAPER).layer_options
    assert options == {name: layer[name].default for name in options}
    assert set(options) == {name for name in OPTION_NAMES if name in layer}


def test_what_a_checkpoint_records():
    """These names are in the checkpoints of earlier versions too."""
    expected = {
        "token": "<car-1>",
        "superclass": "car",
        "gradient_accumulation_steps": 1,
        "embedding_steps": 0,
        "learning_rate": 0.03,
        "embedding_learning_rate": 0.006,
        "relative_learning_rates": False,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_weight_decay": 0.0,
        "adam_epsilon": 1e-8,
        "max_grad_norm": None,
        "gates_removal": False,
        "train_beta": 0.75,
        "train_temperature": 0.1,
        "eval_beta": 0.7,
        "eval_temperature": 0.15,
        "input_decay": 0.99,
        "frac_gradient_concept_embed": 0.1,
        "timestep_power": 1.0,
        "seed": 0,
    }
    assert TrainingOptions(**OPTIONS, **PAPER).recorded == expected
    linear = TrainingOptions(**OPTIONS, **PAPER | {"lr_scheduler": "linear"})
    assert linear.recorded == expected | {"lr_scheduler": "linear", "max_train_steps": 500}
    half = TrainingOptions(**OPTIONS, **PAPER | {"embedding_steps": None})
    assert half.recorded == expected | {"embedding_steps": None, "max_train_steps": 500}


@pytest.mark.parametrize("name", OPTION_RANGES)
def test_each_default_is_in_range_and_a_wrong_value_is_refused(name):
    fits, needed = OPTION_RANGES[name]
    wrong = "steep" if OPTION_TYPES[name] in (str, str | None) else -float("inf")
    assert fits(OPTION_DEFAULTS[name]) and not fits(wrong)
    with pytest.raises(ValueError, match=f"`{name}` must be {re.escape(needed)}, got "):
        TrainingOptions(**OPTIONS | {name: wrong})


def test_how_many_checkpoints_a_run_holds():
    def held(**options):
        return TrainingOptions(**OPTIONS, max_train_steps=450, **options).num_checkpoints

    assert [held(), held(checkpointing_steps=None), held(checkpoints_total_limit=3)] == [4, 0, 3]
    assert held(checkpointing_steps=50, checkpoints_total_limit=20) == 9


def test_warnings_and_type_errors_point_at_the_users_line(tmp_path):
    small = [image.resize((8, 8)) for image in IMAGES]
    options = options_for(tmp_path, masks=None, max_train_steps=1, checkpointing_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        train_concept(tiny_pipe(), small, **options, resume_from_checkpoint="latest")
        train_concept(tiny_pipe(), small, **options, seed=1, resume_from_checkpoint="latest")
    ours = [warning for warning in caught if warning.category is UserWarning]
    texts = [str(warning.message)[:20] for warning in ours]
    assert texts == [
        "There is no checkpoi",
        "Pictures smaller tha",
        "There is nothing to ",
        "Pictures smaller tha",
        "The run goes on from",
    ]
    assert {warning.filename for warning in ours} == {__file__}
    with pytest.raises(BeartypeCallHintParamViolation, match="seed") as raised:
        train_concept(tiny_pipe(), small, **options, seed="one")
    mine, *wrappers = raised.traceback
    assert str(mine.path) == __file__ and all("<@beartype" in str(entry.path) for entry in wrappers)
