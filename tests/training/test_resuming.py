"""What a resumed run must share with the run before."""

import pytest
from helpers.small_model import assert_unchanged, state_of
from helpers.tiny_pipes import (
    IMAGES,
    covariance_of,
    options_for,
    tiny_pipe,
)

from perfusion_pytorch import (
    train_concept,
)


def test_what_a_resumed_run_says(tmp_path):
    options = options_for(tmp_path, max_train_steps=2)
    with pytest.warns(UserWarning, match="no checkpoint in .* to resume from; training starts anew"):
        train_concept(tiny_pipe(), IMAGES, **options, resume_from_checkpoint="latest")
    with pytest.raises(
        ValueError, match=r"must hold no checkpoints of another run, but .* has \['checkpoint-2'\]"
    ):
        train_concept(tiny_pipe(), IMAGES, **options)
    with pytest.raises(FileNotFoundError, match=r"got 'checkpoint-9'. There are \['checkpoint-2'\]"):
        train_concept(tiny_pipe(), IMAGES, **options, resume_from_checkpoint="checkpoint-9")
    with pytest.raises(FileNotFoundError, match="must be a checkpoint's folder or 'latest', got ''"):
        train_concept(tiny_pipe(), IMAGES, **options, resume_from_checkpoint="")
    with pytest.raises(ValueError, match="must be of the superclass 'house', got one of 'car'"):
        train_concept(
            tiny_pipe(), IMAGES, **options | {"superclass": "house"}, resume_from_checkpoint="latest"
        )
    with pytest.raises(ValueError, match="must be of the token '<car-2>', got one of '<car-1>'"):
        other = options | {
            "token": "<car-2>",
            "covariance": lambda: pytest.fail("the covariance was computed"),
        }
        train_concept(tiny_pipe(), IMAGES, **other, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="`max_train_steps` must be at least 2"):
        train_concept(
            tiny_pipe(), IMAGES, **options | {"max_train_steps": 1}, resume_from_checkpoint="latest"
        )
    with pytest.warns(UserWarning, match="other settings than it began with: seed, pictures"):
        changed = options | {"seed": 1, "masks": None}
        train_concept(tiny_pipe(), IMAGES, **changed, resume_from_checkpoint=tmp_path / "checkpoint-2")
    wide, pipe = tiny_pipe("SDXL"), tiny_pipe()
    state = state_of(wide)
    with (
        pytest.warns(UserWarning, match="covariance, model"),
        pytest.raises(ValueError, match=r"must be of this model, but 'down.* shape \(1, 1, 32\)"),
    ):
        train_concept(
            wide,
            IMAGES,
            **options | {"covariance": covariance_of("SDXL")},
            resume_from_checkpoint="checkpoint-2",
        )
    assert_unchanged(wide, state)
    summary = train_concept(
        pipe, IMAGES, **options | {"max_train_steps": 3}, resume_from_checkpoint="checkpoint-2"
    )
    assert summary.num_steps == 3  # a longer run at a constant rate is the same run
    train_concept(
        tiny_pipe(), IMAGES, **options | {"max_train_steps": 4}, resume_from_checkpoint="checkpoint-2"
    )
    with pytest.raises(
        ValueError,
        match=r"no checkpoints after checkpoint-2, .* has \['checkpoint-4'\]. Resume from 'latest'",
    ):
        train_concept(
            tiny_pipe(), IMAGES, **options | {"max_train_steps": 4}, resume_from_checkpoint="checkpoint-2"
        )
    train_concept(
        tiny_pipe(),
        IMAGES,
        **options_for(tmp_path / "elsewhere"),
        resume_from_checkpoint=tmp_path / "checkpoint-2",
    )
