"""What a run says before its first step."""

import re

import pytest
from helpers.tiny_pipes import IMAGES, MASKS, SETTLED, options_for, tiny_pipe

from perfusion_pytorch import train_concept


def lines(caplog, images, options):
    """The lines that a run logs before its steps, by their first word."""
    caplog.clear()
    caplog.set_level("INFO", "perfusion_pytorch")
    train_concept(tiny_pipe(), images, **options)
    title, *facts = [r.getMessage() for r in caplog.records if r.name.endswith("announcement")]
    assert title == "Training <car-1> (car)."
    assert re.fullmatch(r"  covariance 12 features, after \d+\.\d s", facts.pop())
    return dict(fact.strip().split(maxsplit=1) for fact in facts)


def folder_of(path, images):
    path.mkdir()
    for number, image in enumerate(images):
        image.save(path / f"{number}.png")
    return path


def test_a_run_says_what_it_will_do(tmp_path, caplog):
    pictures = folder_of(tmp_path / "pictures", IMAGES)
    folder_of(pictures / "masks", MASKS)
    options = options_for(tmp_path / "run", **SETTLED, masks=None, gradient_accumulation_steps=2)
    assert lines(caplog, pictures, options) == {
        "pictures": f"3 of {pictures}, cut to the middle square, 16 x 16 pixels",
        "masks": f"3 of 3: in {pictures / 'masks'}",
        "prompts": "2, such as 'a <car-1>'",
        "hardware": "cpu, weights in float32, mixed precision: no",
        "steps": "4 of 8 rows: 2 for the embedding, then 2 for the value outputs",
        "output": f"{tmp_path / 'run'}, a checkpoint every 2 steps",
    }


def test_a_resumed_run_says_from_where(tmp_path, caplog):
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path, max_train_steps=2))
    options = options_for(tmp_path, resume_from_checkpoint="latest")
    assert lines(caplog, IMAGES, options)["resumes"] == f"{tmp_path / 'checkpoint-2'}, after step 2 of 4"
    done = options_for(tmp_path, resume_from_checkpoint="latest")
    with pytest.warns(UserWarning, match=r"nothing to do: .*checkpoint-4 has all 4 steps"):
        found = lines(caplog, IMAGES, done)
    assert found["resumes"] == f"{tmp_path / 'checkpoint-4'}, after step 4 of 4"


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        ({}, "masks", "3 of 3: given"),
        ({"masks": None}, "masks", "none, so that the background is learned too"),
        ({"center_crop": False}, "pictures", "3, squeezed into a square, 16 x 16 pixels"),
        ({}, "steps", "4 of 4 rows: embedding and value outputs at once"),
        ({"mixed_precision": "bf16"}, "hardware", "cpu, weights in float32, mixed precision: bf16"),
        ({"checkpointing_steps": None}, "output", "{folder}, no checkpoints"),
        (
            {"checkpoints_total_limit": 1},
            "output",
            "{folder}, a checkpoint every 2 steps, of which 1 are kept",
        ),
    ],
)
def test_what_it_says_follows_the_options(options, name, expected, tmp_path, caplog):
    found = lines(caplog, IMAGES, options_for(tmp_path, **options))
    assert found[name] == expected.format(folder=tmp_path)
