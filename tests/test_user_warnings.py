"""Warnings and type errors point at the user's line."""

import traceback
import warnings

import pytest
import torch
from torch import nn

from perfusion_pytorch import (
    InputCovariance,
    Rank1EditModule,
    concept_inputs,
    merge_rank1_edit_modules,
    wrap_cross_attentions_,
)
from perfusion_pytorch.user_warnings import warn_user

INDEFINITE = torch.diag(torch.tensor([1.0, -2.0]))


def trained_layer(num_concepts=1):
    """Return a layer whose concepts are all the same."""
    layer = Rank1EditModule(nn.Linear(2, 3), C=torch.eye(2), num_concepts=num_concepts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for concept in range(num_concepts):
            layer(torch.ones(1, 1, 2), torch.ones(1, 1, 2), torch.tensor([0]), concept_id=concept)
    return layer


def wrap(C):
    return wrap_cross_attentions_(nn.ModuleDict({"to_v": nn.Linear(2, 3)}), C=C, value_names=["to_v"])


def train_in_context(layer):
    options = {"text_enc_with_superclass": torch.ones(1, 1, 2), "concept_indices": torch.tensor([0])}
    with concept_inputs(layer, **options):
        layer(torch.ones(1, 1, 2))


CASES = {
    "inverse": lambda: InputCovariance(INDEFINITE).inverse(),
    "a layer's constructor, under beartype": lambda: Rank1EditModule(nn.Linear(2, 3), C=INDEFINITE),
    "wrapping a model, under beartype twice": lambda: wrap(INDEFINITE),
    "a training call, through nn.Module": lambda: train_in_context(trained_layer(2)),
    "a loaded state, through torch's hooks": lambda: trained_layer(2).load_state_dict(
        trained_layer(2).state_dict()
    ),
    "merging": lambda: merge_rank1_edit_modules(*[trained_layer()] * 2),
}


@pytest.mark.parametrize("case", CASES)
def test_warnings_point_at_the_users_line(case):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CASES[case]()
    assert [(w.category, w.filename) for w in caught] == [(UserWarning, __file__)]


def test_lines_of_this_package_are_passed_over():
    """Here a line that runs under the name of one of its modules."""
    inner = {"__name__": "perfusion_pytorch.cli.main", "warn_user": warn_user}
    exec(compile("def run():\n    warn_user('as a test')\n", "inner.py", "exec"), inner)
    with pytest.warns(UserWarning, match="as a test") as caught:
        inner["run"]()
    assert caught[0].filename == __file__


def test_type_errors_point_at_the_users_line():
    """beartype raises from a wrapper without source, so the last line in a traceback is the user's."""
    with pytest.raises(Exception, match="num_concepts='2'") as caught:
        Rank1EditModule(nn.Linear(2, 3), num_concepts="2")
    frames = [frame for frame in traceback.extract_tb(caught.tb) if frame.line]
    assert frames[-1].filename == __file__ and "num_concepts" in frames[-1].line
