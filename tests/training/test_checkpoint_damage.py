"""Every file of a checkpoint is under its checksum: no damaged one is resumed from."""

import json
import random

import pytest
import torch
from helpers.damage import cut_or_flipped

from perfusion_pytorch.files import sha256_of
from perfusion_pytorch.training.checkpoints import load_checkpoint, save_checkpoint

TENSORS = {"output": torch.arange(8.0), "initialized": torch.tensor([True, False])}
FACTS = {"learning_rate": 0.04, "token": "<car-1>", "losses": [0.5, 0.25]}


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_no_damaged_checkpoint_is_ever_loaded(tmp_path, name):
    path = save_checkpoint(tmp_path, 2, TENSORS, FACTS) / name
    for what, content in cut_or_flipped(path.read_bytes(), random.Random(0), 200):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be used as a checkpoint: .* Resume from an earlier"):
            raise AssertionError(f"{what} was loaded: {load_checkpoint(path.parent)}")


def test_a_checkpoint_from_before_its_facts_were_under_the_checksum_still_loads(tmp_path):
    folder = save_checkpoint(tmp_path, 2, TENSORS, FACTS)
    facts = json.loads((folder / "state.json").read_text())
    facts["sha256"] = sha256_of([(folder / "state.safetensors").read_bytes()])
    (folder / "state.json").write_text(json.dumps(facts))
    tensors, about = load_checkpoint(folder)
    assert torch.equal(tensors["output"], TENSORS["output"]) and about["learning_rate"] == 0.04
