"""What the page asks of a training: checked before it starts, and as flags of `perfusion train`."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfusion_pytorch.app.notes import collected_notes
from perfusion_pytorch.app.runs import PICTURES
from perfusion_pytorch.app.shared import Page
from perfusion_pytorch.app.uploads import stage_pictures
from perfusion_pytorch.pipelines.parts import text_encoders_of
from perfusion_pytorch.tokens import check_token_form, superclass_token_ids
from perfusion_pytorch.training.inputs import load_inputs
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.training.preview import preview_sheet

if TYPE_CHECKING:
    from PIL.Image import Image

STAND_IN = ("<object-1>", "object")  # token and superclass, where the squares are looked at without them
SHARE = 5  # validation pictures are made after each fifth of the steps
MOST_STEPS = 20_000
MOST_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """A training as the page describes it.

    Attributes:
        model: the base model's name.
        pictures, masks: where the server has put the uploads.
        makes_masks: whether the page's mask model finds the object.
        token, superclass: of the concept.
        validation_prompt: shown while it is trained, with the token.
        steps, batch, accumulation, precision, checkpointing, seed: as `perfusion train` has them.
    """

    model: str
    pictures: Sequence[str]
    masks: Sequence[str]
    makes_masks: bool = False
    token: str
    superclass: str
    validation_prompt: str = ""
    steps: int = 500
    batch: int = 16
    accumulation: int = 1
    precision: str = "no"
    checkpointing: bool = False
    seed: int = 0

    def options(self, page: Page, images: Path, output_dir: Path, **stand_ins: str) -> TrainingOptions:
        """Return the options of `train_concept`; a ValueError where one is out of its range."""
        for what, value, most in (
            ("number of steps", self.steps, MOST_STEPS),
            ("batch", self.batch, MOST_ROWS),
            ("accumulation", self.accumulation, MOST_ROWS),
        ):
            if not 1 <= value <= most:
                raise ValueError(f"The {what} must be from 1 to {most}, got {value}.")
        makes_masks = self.makes_masks and page.mask_model is not None
        given: dict[str, Any] = {"token": self.token, "superclass": self.superclass, **stand_ins}
        return TrainingOptions(
            images=images,
            output_dir=output_dir,
            mask_model=page.mask_model if makes_masks else None,
            max_train_steps=self.steps,
            embedding_steps=0 if self.steps == 1 else None,
            train_batch_size=self.batch,
            gradient_accumulation_steps=self.accumulation,
            gradient_checkpointing=self.checkpointing,
            mixed_precision=self.precision,
            seed=self.seed,
            validation_prompt=self.validation_prompt.strip() or None,
            validation_steps=max(1, self.steps // SHARE),
            num_validation_images=2,
            **given,
        )

    def flags(self, options: TrainingOptions) -> list[str]:
        """Return the flags, each as one word, so that no text of a user is taken for a flag."""
        flags = [
            f"--token={options.token}",
            f"--superclass={options.superclass}",
            f"--max_train_steps={options.max_train_steps}",
            f"--train_batch_size={options.train_batch_size}",
            f"--gradient_accumulation_steps={options.gradient_accumulation_steps}",
            f"--mixed_precision={options.mixed_precision}",
            f"--seed={options.seed}",
            f"--validation_steps={options.validation_steps}",
            f"--num_validation_images={options.num_validation_images}",
        ]
        flags += [f"--validation_prompt={prompt}" for prompt in options.validation_prompts]
        if options.gradient_checkpointing:
            flags.append("--gradient_checkpointing")
        if options.mask_model is not None:
            flags.append(f"--mask_model={options.mask_model}")
        return flags


def preview(page: Page, request: TrainingRequest) -> tuple["Image", list[str]]:
    """Return the sheet of squares and masks as a training would use them, and what to know about them.

    Raises:
        ValueError: what training would refuse.
    """
    with tempfile.TemporaryDirectory(dir=page.folder) as folder:
        images = stage_pictures(request.pictures, request.masks, Path(folder) / PICTURES)
        stand_in = dict(zip(("token", "superclass"), STAND_IN, strict=True))
        if request.superclass.strip():  # by which a mask model finds the object
            stand_in["superclass"] = request.superclass
        options = request.options(page, images, Path(folder), **stand_in)
        with page.studio.bare_pipeline(request.model) as pipe, collected_notes() as notes:
            inputs = load_inputs(pipe, options, pipe.device)
        # The sheet says where masks are from; this folder means nothing to the user.
        named = [replace(one, mask_source=_named(one.mask_source)) for one in inputs.pictures]
        return preview_sheet(named), notes


def _named(source: str | None) -> str | None:
    """Return where a mask is from, without the folder of a file."""
    return source if source is None or "/" not in source else Path(source).name


def start(page: Page, request: TrainingRequest) -> str:
    """Check a training, start it, and return its run's name.

    Raises:
        ValueError: what training would refuse, or another one is going on.
    """
    _check_words(page, request)
    with page.runs.new(request.token) as folder:
        images = stage_pictures(request.pictures, request.masks, folder / PICTURES)
        options = request.options(page, images, folder)
        facts = {
            "token": request.token,
            "superclass": request.superclass,
            "model": request.model,
            "steps": request.steps,
        }
        page.runs.record(folder, facts, [*page.model_flags[request.model], *request.flags(options)])
    return folder.name


def _check_words(page: Page, request: TrainingRequest) -> None:
    """Raise a ValueError where token, superclass or validation prompt cannot work."""
    if not request.superclass.strip():
        raise ValueError("The superclass must be a word that the model knows for this kind of thing: 'car'.")
    check_token_form(request.token)
    prompt = request.validation_prompt.strip()
    if prompt and request.token not in prompt:
        raise ValueError(f"The validation prompt must hold the token {request.token}, got {prompt!r}.")
    with page.studio.bare_pipeline(request.model) as pipe:
        for _, tokenizer in text_encoders_of(pipe).values():
            superclass_token_ids(tokenizer, request.token, request.superclass)
