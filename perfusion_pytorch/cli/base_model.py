"""The base model, the captions and the concepts that the flags of `perfusion` name."""

from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from perfusion_pytorch.captions.sources import BuiltInCaptions, CaptionFile
from perfusion_pytorch.cli.command import Say
from perfusion_pytorch.concept import Concept
from perfusion_pytorch.extras import required
from perfusion_pytorch.pipelines.covariance_cache import RIDGE
from perfusion_pytorch.pipelines.parts import loaded_on
from perfusion_pytorch.pipelines.verbs import load_concept, set_concepts
from perfusion_pytorch.protocols import Pipeline

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def diffusers() -> Any:
    """Return the diffusers package, without its log messages and progress bars."""
    packages = [required(name) for name in ("diffusers", "transformers")]
    for package in packages:
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()
    return packages[0]


def load_pipeline(args: Namespace, *, dtype: torch.dtype, device: str | torch.device) -> Any:
    """Return the pipeline of the base model that the flags name."""
    name = args.pretrained_model_name_or_path
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(
            f"There is no model folder {name}. "
            "Give a folder in diffusers' format, or a name on the model hub."
        )
    if path.exists() and not (path / "model_index.json").exists():
        raise FileNotFoundError(
            f"{name} must be a model folder in diffusers' format, but it holds no model_index.json."
        )
    where = str(path) if path.exists() else name
    pipe = diffusers().DiffusionPipeline.from_pretrained(
        where, revision=args.revision, variant=args.variant, torch_dtype=dtype
    )
    pipe.set_progress_bar_config(leave=False, desc="pictures")
    return pipe.to(device)


def device_of(args: Namespace) -> torch.device:
    """Return the device that the flags name, by default the fastest available."""
    if args.device is not None:
        return torch.device(args.device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def dtype_of(args: Namespace, *, default: str) -> torch.dtype:
    """Return the precision that the flags name, or a default."""
    return DTYPES[args.dtype or default]


def captions_of(args: Namespace) -> BuiltInCaptions | CaptionFile | list[str]:
    """Return the captions that the flags name: of a file or built in, all or the first ones."""
    if args.captions is None:
        return BuiltInCaptions() if args.num_captions is None else BuiltInCaptions(args.num_captions)
    captions = CaptionFile(args.captions)
    return captions if args.num_captions is None else list(islice(captions, args.num_captions))


def ridge_of(args: Namespace) -> float:
    """Return the covariance's ridge that the flags name, by default the cache's own."""
    return RIDGE if args.ridge is None else args.ridge


def check_concepts(args: Namespace) -> None:
    """Read the concept files that the flags name before the model is loaded, which takes longer."""
    for path in args.concept:
        Concept.load(path)


def load_concepts(pipe: Pipeline, args: Namespace, *, say: Say) -> list[str]:
    """Load the concept files that the flags name, set their gates, and return their names."""
    names = [load_concept(pipe, path) for path in args.concept]
    beta = _by_name(args.beta, names, "--beta")
    temperature = _by_name(args.temperature, names, "--temperature")
    set_concepts(pipe, names, beta=beta, temperature=temperature)
    for name, path in zip(names, args.concept, strict=True):
        concept = loaded_on(pipe).concepts[name]
        gate = f"β {concept.eval_gate[0]:g}, τ {concept.eval_gate[1]:g}"
        say(f"Loaded {name} ({concept.superclass}), {gate}, from {path}.")
    return names


def _by_name(values: list[tuple[str | None, float]], names: list[str], flag: str) -> dict[str, float]:
    """Turn (name or None, number) pairs into a number for each name; those with a name win."""
    unknown = [name for name, _ in values if name is not None and name not in names]
    if unknown:
        raise ValueError(f"`{flag}` must name one of the loaded concepts {names}, got {unknown}.")
    everyone = {name: value for key, value in values if key is None for name in names}
    return everyone | {name: value for name, value in values if name is not None}
