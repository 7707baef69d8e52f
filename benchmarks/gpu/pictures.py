"""What a picture costs: prompts, denoising and decoding, with concepts, with LoRAs, and with neither."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_train import peak_bytes
from gpu.cells import Parts, allocated_bytes, interleaved, medians, one_line, ratio, synchronize
from gpu.concepts import load_all, prompt_of
from gpu.models import shared_copy, weight_bytes

BASE = "no concept"
CONCEPTS = {"1 concept": 1, "3 concepts": 3, "8 concepts": 8}
LORAS = {"LoRA, rank 1": 1, "LoRA, rank 4": 4}
DECODING = "decoding"
FIRST = "seconds of the first picture, of two steps"  # compiling included
WARM_UP_STEPS = 2
LEAST_ROUNDS = 2


@dataclass(eq=False)
class Contender:
    """A pipeline with something on it, and the prompt that it makes a picture of.

    Attributes:
        own_bytes: what it takes up on the GPU beside the shared weights.
    """

    pipe: Any
    prompt: str
    own_bytes: int = 0


def add_lora_(unet: torch.nn.Module, rank: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Put peft's LoRA on the keys and values of a UNet's cross attentions; return its parameters."""
    from peft import LoraConfig

    unet.add_adapter(LoraConfig(r=rank, target_modules=r".*attn2\.to_[kv]", init_lora_weights=False))
    parameters = [p for name, p in unet.named_parameters() if "lora_" in name]
    for parameter in parameters:
        parameter.data = parameter.data.to(unet.device, dtype)
    return parameters


@contextmanager
def called_before(owner: Any, name: str, first: Callable[[], None]) -> Iterator[None]:
    """Call a function before a method of an object within the block."""
    own = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        first()
        return own(*args, **kwargs)

    setattr(owner, name, run)
    try:
        yield
    finally:
        delattr(owner, name)


def picture(contender: Contender, steps: int) -> Parts:
    """Make the latents of a picture, and return the seconds of encoding the prompt and of denoising."""
    pipe, moments = contender.pipe, []

    def moment() -> None:
        synchronize()
        moments.append(time.perf_counter())

    moment()
    # Both pipelines set the scheduler's times once the prompt is encoded. A hook on the UNet would be
    # compiled along with it.
    with called_before(pipe.scheduler, "set_timesteps", moment):
        generator = torch.Generator().manual_seed(0)
        pipe(contender.prompt, num_inference_steps=steps, generator=generator, output_type="latent")
    moment()
    start, encoded, end = moments
    return {"encoding": encoded - start, "denoising": end - encoded}


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor) -> Parts:
    """Decode latents as the pipelines do, and return the seconds."""
    synchronize()
    start = time.perf_counter()
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    pipe.image_processor.postprocess(pixels, output_type="pt")
    synchronize()
    return {DECODING: time.perf_counter() - start}


def waits_of(contender: Contender, set_mode: Callable[[str], None]) -> str:
    """Return "none" if the denoiser calls of a picture wait for the GPU nowhere, else where they do.

    Args:
        contender: whose picture is made.
        set_mode: `torch.cuda.set_sync_debug_mode`.
    """
    unet = contender.pipe.unet
    hooks = [
        unet.register_forward_pre_hook(lambda *_: set_mode("error"), prepend=True),
        unet.register_forward_hook(lambda *_: set_mode("default")),
    ]
    try:
        picture(contender, WARM_UP_STEPS)
    except RuntimeError as error:
        return one_line(error)
    finally:
        set_mode("default")
        for hook in hooks:
            hook.remove()
    return "none"


class Pictures:
    """The contenders of a model, made when they are first needed, and their cells.

    Args:
        pipe: the model's pipeline; it stays as it is.
        paths: concept files, at least as many as any contender loads.
        steps: denoising steps of a picture.
        most_rounds: of a cell.
    """

    def __init__(self, pipe: Any, paths: Sequence[Path], steps: int, most_rounds: int) -> None:
        self.pipe, self.paths, self.steps, self.most_rounds = pipe, paths, steps, most_rounds
        self.weights = weight_bytes(pipe)
        unet = pipe.unet
        shape = (1, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self.latents = torch.randn(shape).to(unet.device, unet.dtype)
        self.made: dict[str, Contender] = {}

    def eager(self, names: Sequence[str], deadline: float) -> dict[str, Any]:
        """Measure pictures of some contenders; the first is what the others are compared with."""
        contenders, errors = self._contenders(names)
        return self._measured(contenders, errors, deadline)

    def compiled(self, names: Sequence[str], deadline: float, *, whole: bool = False) -> dict[str, Any]:
        """Compile the UNets of new contenders, or only their repeated blocks, and measure pictures."""
        from torch._dynamo import config, utils

        backend = "inductor" if torch.cuda.is_available() else "eager"
        contenders, errors = self._contenders(names, made={})
        for contender in contenders.values():
            unet = contender.pipe.unet
            if whole:
                contender.pipe.unet = torch.compile(unet, backend=backend, dynamic=False)
            else:
                unet.compile_repeated_blocks(backend=backend, dynamic=False)
        utils.counters.clear()
        # Contenders share code, and each has a graph of its own for each size of a block.
        with config.patch(cache_size_limit=128):
            found = self._measured(contenders, errors, deadline, slow_start=True)
        breaks = sum(utils.counters["graph_break"].values())
        return {"compiled": "the UNet" if whole else "repeated blocks", "graph breaks": breaks} | found

    def with_many_loaded(self, paths: Sequence[Path], deadline: float) -> dict[str, Any]:
        """Load concept files on one pipeline, and measure a picture whose prompt holds one of them."""
        from perfusion_pytorch import delete_concepts, get_list_concepts

        before = allocated_bytes()
        pipe = shared_copy(self.pipe)
        seconds = load_all(pipe, paths, deadline)
        many = Contender(pipe, prompt_of(1), allocated_bytes() - before)
        contenders, errors = self._contenders([BASE, "1 concept"])
        contenders[f"1 concept of {len(seconds):,} loaded"] = many
        found = self._measured(contenders, errors, deadline)
        ends = {"first ten": seconds[:10], "last ten": seconds[-10:]}
        found["loading, milliseconds each"] = {
            name: 1000 * sum(some) / len(some) for name, some in ends.items()
        }
        start = time.perf_counter()
        delete_concepts(pipe, get_list_concepts(pipe)[len(seconds) // 2])
        found["deleting one of them, milliseconds"] = 1000 * (time.perf_counter() - start)
        return found

    def waits(self, names: Sequence[str], deadline: float) -> dict[str, Any]:
        """Find out whether denoiser calls wait for the GPU, which stops what runs ahead of it."""
        if not torch.cuda.is_available():
            raise RuntimeError("whether calls wait for the GPU shows on a GPU only")
        contenders, errors = self._contenders(names)
        waits = {name: waits_of(c, torch.cuda.set_sync_debug_mode) for name, c in contenders.items()}
        return {"waits": waits | errors}

    def _contenders(
        self, names: Sequence[str], made: dict[str, Contender] | None = None
    ) -> tuple[dict[str, Contender], dict[str, str]]:
        """Return contenders by name, and for each that cannot be made one line that says why.

        Args:
            names: of the contenders.
            made: those that are there already; it is added to. By default the eager ones.
        """
        made = self.made if made is None else made
        errors: dict[str, str] = {}
        for name in names:
            if name in made:
                continue
            try:
                made[name] = self._contender(name)
            except Exception as error:
                errors[name] = one_line(error)
        return {name: made[name] for name in names if name in made}, errors

    def _contender(self, name: str) -> Contender:
        before = allocated_bytes()
        pipe = shared_copy(self.pipe)
        count = CONCEPTS.get(name, 0)
        load_all(pipe, self.paths[:count], float("inf"))
        if name in LORAS:
            add_lora_(pipe.unet, LORAS[name], pipe.unet.dtype)
        return Contender(pipe, prompt_of(count), allocated_bytes() - before)

    def _measured(
        self,
        contenders: Mapping[str, Contender],
        errors: Mapping[str, str],
        deadline: float,
        *,
        slow_start: bool = False,
    ) -> dict[str, Any]:
        """Let contenders and the decoder take turns, and then measure each one's memory.

        `errors` are those of contenders that could not be made. For `slow_start` see `interleaved`.
        """
        starts: dict[str, float] = {}

        def warm_up(name: str) -> None:
            start = time.perf_counter()
            picture(contenders[name], WARM_UP_STEPS)
            starts[name] = time.perf_counter() - start

        decoding = {DECODING: partial(decode, self.pipe, self.latents)}
        found = interleaved(
            decoding | {name: partial(picture, c, self.steps) for name, c in contenders.items()},
            deadline,
            warm_up=decoding | {name: partial(warm_up, name) for name in contenders},
            least=LEAST_ROUNDS,
            most=self.most_rounds,
            slow_start=slow_start,
        )
        decoded = medians(found.rounds.pop(DECODING, []))
        rounds = {name: [run | decoded for run in runs] for name, runs in found.rounds.items()}
        base = rounds.get(BASE, [])
        entries: dict[str, Any] = {
            name: self._entry(contenders[name], runs, base) | {FIRST: starts[name]}
            for name, runs in rounds.items()
        }
        failed = {**errors, **found.errors}
        about: dict[str, Any] = {"steps": self.steps, "rounds": len(base)}
        if DECODING in failed:
            about["error"] = f"{DECODING}: {failed.pop(DECODING)}"
        else:
            about["peak memory of decoding, bytes"] = self._peak(decoding[DECODING], 0)
        return about | {"contenders": entries | {name: {"error": line} for name, line in failed.items()}}

    def _entry(self, contender: Contender, runs: Sequence[Parts], base: Sequence[Parts]) -> dict[str, Any]:
        """Return what is reported of a contender, given its seconds and the base's in each round."""
        own = contender.own_bytes
        return {
            "picture over the base's": ratio(runs, base, list(runs[0])),
            "denoising over the base's": ratio(runs, base, ["denoising"]),
            "seconds": medians(runs),
            "peak memory of denoising, bytes": self._peak(partial(picture, contender, WARM_UP_STEPS), own),
            "memory of its own, bytes": own,
        }

    def _peak(self, run: Callable[[], Any], own: int) -> int | None:
        """Return the most memory that a run takes if nothing but its own pipeline is there."""
        before = allocated_bytes()
        peak = peak_bytes(run)
        return None if peak is None else self.weights + own + peak - before
