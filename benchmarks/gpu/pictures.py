"""What a picture costs: prompts, denoising and decoding, with concepts, with LoRAs, and with neither."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
WARM_UP_STEPS = 2


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
        parameter.data = parameter.data.to(dtype)
    return parameters


@contextmanager
def call_before(owner: Any, name: str, first: Callable[[], None]) -> Iterator[None]:
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


def latents_of(contender: Contender, steps: int) -> tuple[torch.Tensor, Parts]:
    """Return a picture's latents, and the seconds of encoding the prompt and of denoising."""
    pipe, moments = contender.pipe, []

    def moment() -> None:
        synchronize()
        moments.append(time.perf_counter())

    moment()
    # Both pipelines set the scheduler's times once the prompt is encoded. A hook on the UNet would be
    # compiled along with it.
    with call_before(pipe.scheduler, "set_timesteps", moment):
        generator = torch.Generator().manual_seed(0)
        latents = pipe(
            contender.prompt, num_inference_steps=steps, generator=generator, output_type="latent"
        ).images
    moment()
    start, encoded, end = moments
    return latents, {"encoding": encoded - start, "denoising": end - encoded}


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
        unet.register_forward_pre_hook(lambda *_: set_mode("error")),
        unet.register_forward_hook(lambda *_: set_mode("default")),
    ]
    try:
        latents_of(contender, WARM_UP_STEPS)
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
    """

    def __init__(self, pipe: Any, paths: Sequence[Path], steps: int) -> None:
        self.pipe, self.paths, self.steps = pipe, paths, steps
        self.weights = weight_bytes(pipe)
        self.contenders: dict[str, Contender] = {}
        self.compiler = "inductor" if torch.cuda.is_available() else "eager"

    def contender(self, name: str) -> Contender:
        """Return a contender by its name."""
        if name not in self.contenders:
            before = allocated_bytes()
            pipe = shared_copy(self.pipe)
            count = CONCEPTS.get(name, 0)
            load_all(pipe, self.paths[:count], float("inf"))
            if name in LORAS:
                add_lora_(pipe.unet, LORAS[name], pipe.unet.dtype)
                pipe.unet.to(self.pipe.unet.device)
            self.contenders[name] = Contender(pipe, prompt_of(count), allocated_bytes() - before)
        return self.contenders[name]

    def eager(self, names: Sequence[str], deadline: float) -> dict[str, Any]:
        """Measure pictures of some contenders; the first is what the others are compared with."""
        made, errors = self._made(names)
        return self._measured(made, errors, deadline)

    def compiled(self, names: Sequence[str], deadline: float, *, whole: bool = False) -> dict[str, Any]:
        """Compile the UNets of some contenders, or only their repeated blocks, and measure pictures.

        From then on these contenders are compiled.
        """
        made, errors = self._made(names)
        # Contenders share code, and each has a graph of its own for each size of a block.
        torch._dynamo.config.cache_size_limit = 128
        for contender in made.values():
            unet = contender.pipe.unet
            if whole:
                contender.pipe.unet = torch.compile(unet, backend=self.compiler, dynamic=False)
            else:
                unet.compile_repeated_blocks(backend=self.compiler, dynamic=False)
        return {"compiled": "the UNet" if whole else "repeated blocks"} | self._measured(
            made, errors, deadline
        )

    def with_many_loaded(self, paths: Sequence[Path], deadline: float) -> dict[str, Any]:
        """Load concept files on one pipeline, and measure a picture whose prompt holds one of them."""
        from perfusion_pytorch import delete_concepts, get_list_concepts

        before = allocated_bytes()
        pipe = shared_copy(self.pipe)
        seconds = load_all(pipe, paths, deadline)
        many = Contender(pipe, prompt_of(1), allocated_bytes() - before)
        made, errors = self._made([BASE, "1 concept"])
        found = self._measured(made | {f"1 concept of {len(seconds):,} loaded": many}, errors, deadline)
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
        made, errors = self._made(names)
        waits = {name: waits_of(c, torch.cuda.set_sync_debug_mode) for name, c in made.items()}
        return {"waits": waits | errors}

    def _made(self, names: Sequence[str]) -> tuple[dict[str, Contender], dict[str, str]]:
        made: dict[str, Contender] = {}
        errors: dict[str, str] = {}
        for name in names:
            try:
                made[name] = self.contender(name)
            except Exception as error:
                errors[name] = one_line(error)
        return made, errors

    def _measured(
        self, made: dict[str, Contender], errors: dict[str, str], deadline: float
    ) -> dict[str, Any]:
        """Let contenders and the decoder take turns, and then measure each one's memory."""
        latents: list[torch.Tensor] = []
        warm_up_seconds: dict[str, float] = {}

        def warm_up(name: str, contender: Contender) -> None:
            start = time.perf_counter()
            latents[:] = [latents_of(contender, WARM_UP_STEPS)[0]]
            warm_up_seconds[name] = time.perf_counter() - start

        runs = {name: lambda c=c: latents_of(c, self.steps)[1] for name, c in made.items()}
        warm_ups = {name: lambda name=name, c=c: warm_up(name, c) for name, c in made.items()}
        turns = {DECODING: lambda: decode(self.pipe, latents[0])}
        found, failed = interleaved(runs | turns, deadline, warm_up=warm_ups | turns, least=2)
        decoding = found.pop(DECODING, [])
        parts = medians(decoding) if decoding else {DECODING: 0.0}
        found = {name: [run | parts for run in rounds] for name, rounds in found.items() if rounds}
        base = found.get(BASE)
        contenders: dict[str, Any] = {name: {"error": line} for name, line in (errors | failed).items()}
        for name, rounds in found.items():
            contenders[name] = {
                "picture over the base's": ratio(rounds, base, list(rounds[0])),
                "denoising over the base's": ratio(rounds, base, ["denoising"]),
                "seconds": medians(rounds),
                "seconds of the first, short picture": warm_up_seconds[name],
                "peak memory of denoising, bytes": self._peak(
                    lambda c=made[name]: latents_of(c, WARM_UP_STEPS), made[name].own_bytes
                ),
                "memory of its own, bytes": made[name].own_bytes,
            }
        rounds = len(next(iter(found.values()), []))
        peak = self._peak(lambda: decode(self.pipe, latents[0]), 0) if latents else None
        return {
            "steps": self.steps,
            "rounds": rounds,
            "peak memory of decoding, bytes": peak,
            "contenders": contenders,
        }

    def _peak(self, run: Callable[[], Any], own: int) -> int | None:
        """Return the most memory that a run takes if nothing but its own pipeline is there."""
        before = allocated_bytes()
        peak = peak_bytes(run)
        return None if peak is None else self.weights + own + peak - before
