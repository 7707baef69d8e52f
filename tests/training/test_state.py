"""How large a checkpoint will be."""

import shutil
from types import SimpleNamespace

import pytest
from helpers.tiny_pipes import (
    IMAGES,
    KINDS,
    options_for,
    tiny_pipe,
)

from perfusion_pytorch import (
    train_concept,
)
from perfusion_pytorch.training.state import num_checkpoint_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_without_room_for_the_checkpoints_is_found_first(tmp_path, monkeypatch, kind):
    summary = train_concept(tiny_pipe(kind), IMAGES, **options_for(tmp_path / "a", kind))
    size, expected = (
        sum(path.stat().st_size for path in summary.checkpoints[-1].iterdir()),
        num_checkpoint_bytes(tiny_pipe(kind)),
    )
    assert size <= expected <= size + 2**17
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: SimpleNamespace(free=4 * expected - 1)
    )  # two checkpoints, two to spare
    options = options_for(tmp_path / "b", kind, covariance=lambda: pytest.fail("the covariance was computed"))
    with pytest.raises(OSError, match=f"at least {4 * expected:,} bytes free, got {4 * expected - 1:,}"):
        train_concept(tiny_pipe(kind), IMAGES, **options)
