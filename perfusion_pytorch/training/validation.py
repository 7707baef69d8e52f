"""Pictures of a concept while it is being trained."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfusion_pytorch.concept_tokenizer import concepts_in
from perfusion_pytorch.grids import write_png
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
from perfusion_pytorch.pipelines.parts import text_encoders_of
from perfusion_pytorch.pipelines.picture_facts import picture_facts, warn_of_black_pictures
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.training.interruption import Interruption

INFERENCE_STEPS = 25
GATE = ("beta", "temperature")


def write_validation_grid(
    pipe: StableDiffusion,
    layers: Mapping[str, Rank1EditModule],
    path: Path,
    prompts: Sequence[str],
    *,
    token: str,
    count: int,
    resolution: int,
    seed: int,
    interruption: Interruption,
) -> None:
    """Write a PNG with a row of pictures for each prompt; the state of training does not change.

    Args:
        pipe, layers: the prepared pipeline and its wrapped layers, which are in eval mode meanwhile.
        path: the file, written atomically.
        prompts: what to show.
        token: the concept's; as with a loaded concept, only rows whose prompt holds it are edited.
        count: pictures of a row; picture i starts from noise number seed + i, whatever the step.
        resolution: edge of a picture in pixels.
        seed: see `count`.
        interruption: checked before each picture; once it is wanted, nothing is written.
    """
    from diffusers.utils import make_image_grid

    bars = getattr(pipe, "_progress_bar_config", None)
    results = []
    options: dict[str, Any] = {
        "height": resolution,
        "width": resolution,
        "num_inference_steps": INFERENCE_STEPS,
    }
    _, tokenizer = next(iter(text_encoders_of(pipe).values()))
    modes = {layer: layer.training for layer in layers.values()}
    for layer in modes:
        layer.eval()
    pipe.set_progress_bar_config(disable=True)
    try:
        for prompt in prompts:
            has_concept = token in concepts_in(tokenizer, prompt)
            for i in range(count):  # one at a time, so that memory is that of one picture
                if interruption.is_wanted:
                    return
                generator = torch.Generator().manual_seed(seed + i)
                with _edits_of_the_prompt_alone(pipe, layers.values(), has_concept=has_concept):
                    results.append(pipe(prompt, generator=generator, **options))
    finally:
        for layer, is_training in modes.items():
            layer.train(is_training)
        if bars is None:
            del vars(pipe)["_progress_bar_config"]
        else:
            vars(pipe)["_progress_bar_config"] = bars
    warn_of_black_pictures(pipe, results)
    first = next(iter(layers.values()))
    gate = {name: round(getattr(first, f"eval_{name}")[0].item(), 6) for name in GATE}
    seeds = [seed + i for i in range(count)]
    facts = picture_facts(pipe, rows=list(prompts), seeds=seeds, concepts=[gate], **options)
    images = [image for result in results for image in result.images]
    write_png(path, make_image_grid(images, rows=len(prompts), cols=count), facts=facts)


@contextmanager
def _edits_of_the_prompt_alone(
    pipe: Any, layers: Collection[Rank1EditModule], *, has_concept: bool
) -> Iterator[None]:
    """Let layers edit only the rows of a prompt, and not those of the negative one, which come first.

    Args:
        pipe: the pipeline.
        layers: its wrapped layers.
        has_concept: whether the prompt holds the concept; if not, nothing is edited.
    """

    def without_others(layer: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (text_enc,) = arguments
        plain = F.linear(text_enc, layer.weight, layer.bias)  # type: ignore[arg-type]
        if not has_concept:
            return plain
        others = len(text_enc) // 2 if pipe.do_classifier_free_guidance else 0
        return torch.cat([plain[:others], output[others:]])

    handles = [layer.register_forward_hook(without_others) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
