"""The base model, the captions and the concepts that flags of `perfusion` name."""

from itertools import islice
from pathlib import Path

import torch

from perfusion_pytorch.captions.sources import BuiltInCaptions, CaptionFile
from perfusion_pytorch.concept import Concept
from perfusion_pytorch.extras import required
from perfusion_pytorch.pipelines.parts import loaded_on
from perfusion_pytorch.pipelines.verbs import load_concept, set_concepts

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def diffusers():
    """Return the diffusers package, without its chatter."""
    packages = [required(name) for name in ("diffusers", "transformers")]
    for package in packages:
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()
    return packages[0]


def load_pipeline(args, *, dtype: torch.dtype, device: str | torch.device):
    """Load the base model that the flags name."""
    name = args.pretrained_model_name_or_path
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(
            f"There is no model folder {name}. Give a folder in diffusers' format, or a name on the model hub."
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


def device_of(args) -> torch.device:
    """Return the device that the flags name, by default the fastest there is."""
    if args.device is not None:
        return torch.device(args.device)
    return torch.device(
        "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    )


def dtype_of(args, device: torch.device) -> torch.dtype:
    """Return the precision that the flags name, by default half precision on CUDA devices."""
    return DTYPES[args.dtype or ("float16" if device.type == "cuda" else "float32")]


def captions_of(args):
    """Return the captions that the flags name: of a file or built in, all or the first ones."""
    if args.captions is None:
        return BuiltInCaptions() if args.num_captions is None else BuiltInCaptions(args.num_captions)
    captions = CaptionFile(args.captions)
    return captions if args.num_captions is None else list(islice(captions, args.num_captions))


def ridge_of(args) -> float:
    """Return the covariance's ridge that the flags name, by default the cache's own."""
    from perfusion_pytorch.pipelines.covariance_cache import RIDGE

    return RIDGE if args.ridge is None else args.ridge


def check_concepts(args) -> None:
    """Read the concept files that the flags name, before the model is loaded for them, which takes longer."""
    for path in args.concept:
        Concept.load(path)


def load_concepts(pipe, args, *, say) -> list[str]:
    """Load the concept files that the flags name, set their gates, and return their names."""
    names = [load_concept(pipe, path) for path in args.concept]
    gates = {
        "beta": _by_name(args.beta, names, "--beta"),
        "temperature": _by_name(args.temperature, names, "--temperature"),
    }
    set_concepts(pipe, names, **gates)
    for name, path in zip(names, args.concept, strict=True):
        concept = loaded_on(pipe).concepts[name]
        say(
            f"Loaded {name} ({concept.superclass}), β {concept.eval_gate[0]:g}, τ {concept.eval_gate[1]:g}, from {path}."
        )
    return names


def _by_name(values, names, flag):
    """Turn (name or None, number) pairs into a number for each name; those with a name win."""
    unknown = [name for name, _ in values if name is not None and name not in names]
    if unknown:
        raise ValueError(f"`{flag}` must name one of the loaded concepts {names}, got {unknown}.")
    everyone = {name: number for key, number in values if key is None for name in names}
    return everyone | {name: number for name, number in values if name is not None}
