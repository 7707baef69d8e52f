"""The base model, the captions and the concepts that the flags of `perfusion` name."""

import warnings
from argparse import Namespace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from perfusion_pytorch.captions.sources import BuiltInCaptions, CaptionFile
from perfusion_pytorch.cli.command import Say
from perfusion_pytorch.concept import Concept
from perfusion_pytorch.early_interrupts import ends_at_ctrl_c
from perfusion_pytorch.extras import required
from perfusion_pytorch.hub import check_is_available, find_concept
from perfusion_pytorch.pipelines.covariance_cache import RIDGE, default_captions
from perfusion_pytorch.pipelines.parts import loaded_on
from perfusion_pytorch.pipelines.verbs import load_concept, set_concepts
from perfusion_pytorch.protocols import Pipeline
from perfusion_pytorch.user_warnings import warn_user

INDEX = "model_index.json"  # of a folder in diffusers' format
# Of one-file models: the denoiser's weights, and those of SDXL's second text encoder.
UNET = "model.diffusion_model."
SDXL_ONLY = "conditioner.embedders.1."
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def diffusers() -> Any:
    """Return the diffusers package, without its log messages and progress bars."""
    with ends_at_ctrl_c():
        packages = [required(name) for name in ("diffusers", "transformers")]
    for package in packages:
        package.utils.logging.set_verbosity_error()
        package.utils.logging.disable_progress_bar()
    return packages[0]


def load_pipeline(args: Namespace, *, dtype: torch.dtype, device: str | torch.device) -> Any:
    """Return the pipeline of the base model that the flags name: a folder, a name on the hub, or one file."""
    name = args.pretrained_model_name_or_path
    path = Path(name).expanduser()
    if not path.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(
            f"There is no model folder {name}. "
            "Give a folder in diffusers' format, or a name on the model hub."
        )
    if path.exists() and (args.revision or (args.variant and path.is_file())):
        flag = "--revision" if args.revision else "--variant"
        raise ValueError(f"`{flag}` chooses among files on the model hub, but {name} is already here.")
    with warnings.catch_warnings():
        # `dtype`, its new name, is not known to the oldest diffusers that this library runs with.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        pipe = _of_one_file(path, dtype) if path.is_file() else _of_folder_or_hub(args, path, dtype)
    pipe.set_progress_bar_config(leave=False, desc="pictures")
    return pipe.to(device)


def _of_folder_or_hub(args: Namespace, path: Path, dtype: torch.dtype) -> Any:
    name = args.pretrained_model_name_or_path
    if path.exists() and not (path / INDEX).exists():
        raise FileNotFoundError(
            f"{name} must be a model folder in diffusers' format, but it holds no {INDEX}."
        )
    package = diffusers()
    check_is_available(name, filename=INDEX, revision=args.revision)
    where = str(path) if path.exists() else name
    return package.DiffusionPipeline.from_pretrained(
        where, revision=args.revision, variant=args.variant, torch_dtype=dtype
    )


def _of_one_file(path: Path, dtype: torch.dtype) -> Any:
    """Return the pipeline of a file in the format of the original Stable Diffusion."""
    if path.suffix != ".safetensors":
        raise ValueError(
            f"A model of one file must be a .safetensors file, got {path}. Others, such as .ckpt, can run "
            "code when they are opened. Convert it first, or give a folder in diffusers' format."
        )
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, but it cannot be read: {error}. Get it again."
        ) from error
    if not any(name.startswith(UNET) for name in names):
        raise ValueError(
            f"{path} must hold a whole Stable Diffusion, with weights under '{UNET}', but it holds none. "
            "Give the base model, not a LoRA or a concept."
        )
    is_xl = any(name.startswith(SDXL_ONLY) for name in names)
    package = diffusers()
    kind = package.StableDiffusionXLPipeline if is_xl else package.StableDiffusionPipeline
    try:
        return kind.from_single_file(str(path), torch_dtype=dtype)
    except (OSError, ValueError, LookupError) as error:
        raise ValueError(
            f"{path} cannot be loaded as a {kind.__name__} ({_first_line(error)}). Its "
            "configuration comes from the model hub: connect to the network, or give a folder in diffusers' "
            "format."
        ) from error


def device_of(args: Namespace) -> torch.device:
    """Return the device that the flags name, by default the fastest available.

    Raises:
        ValueError: this machine has no such device.
    """
    if args.device is not None:
        try:
            return torch.empty(0, device=args.device).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # as torch's backends differ
            raise ValueError(
                f"`device` must be one that this machine has, got {args.device!r} ({_first_line(error)}). "
                f"It has {', '.join(_devices())}."
            ) from error
    return torch.device(_devices()[0])


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _devices() -> list[str]:
    """Return the kinds of devices of this machine, the fastest first."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, is_there in has.items() if is_there]


def dtype_of(args: Namespace, *, default: str) -> torch.dtype:
    """Return the precision that the flags name, or a default."""
    return DTYPES[args.dtype or default]


def captions_of(args: Namespace, pipe: Pipeline) -> BuiltInCaptions | CaptionFile | list[str]:
    """Return the captions that the flags name, by default the model's own or built-in ones: all or the first.

    Raises:
        ValueError: the file holds no captions.
        OSError: it cannot be read.

    Warns:
        UserWarning: it holds fewer than are asked for.
    """
    captions = default_captions(pipe) if args.captions is None else CaptionFile(args.captions)
    if args.num_captions is None:
        check_captions(args)
        return captions
    if isinstance(captions, BuiltInCaptions):
        return BuiltInCaptions(args.num_captions)
    first = list(islice(captions, args.num_captions))
    if len(first) < args.num_captions:
        name = args.captions or "the model's own file"
        warn_user(f"--num_captions is {args.num_captions:,}, but {name} holds {len(first):,}.")
    return first


def check_captions(args: Namespace) -> None:
    """Raise a ValueError or an OSError where the file of captions that the flags name cannot be used."""
    if args.captions is not None:
        next(iter(CaptionFile(args.captions)))


def ridge_of(args: Namespace) -> float:
    """Return the covariance's ridge that the flags name, by default the cache's own."""
    return RIDGE if args.ridge is None else args.ridge


def check_concepts(args: Namespace) -> None:
    """Read the concept files that the flags name before the model is loaded, which takes longer.

    The folders of training runs and the names on the hub among them are replaced by their files; `args.named`
    is what they were.

    Raises:
        ValueError: a file is damaged, or given twice.
        OSError: a file does not exist, here or on the hub.
    """
    args.named = args.concept
    args.concept = [find_concept(path) for path in args.concept]
    seen: set[Path] = set()
    for path in args.concept:
        Concept.load(path)
        if path.resolve() in seen:
            raise ValueError(f"`--concept` must name each file once, got {path} twice.")
        seen.add(path.resolve())


def load_concepts(pipe: Pipeline, args: Namespace, *, say: Say) -> list[str]:
    """Load the concept files that the flags name, set their gates, and return their names."""
    names = [load_concept(pipe, path) for path in args.concept]
    if len(set(names)) < len(names):
        raise ValueError(f"`--concept` must name different concepts, got {names}. Give each once.")
    beta = _by_name(args.beta, names, "--beta")
    temperature = _by_name(args.temperature, names, "--temperature")
    set_concepts(pipe, names, beta=beta, temperature=temperature)
    for name, named in zip(names, args.named, strict=True):
        concept = loaded_on(pipe).concepts[name]
        gate = f"β {concept.eval_gate[0]:g}, τ {concept.eval_gate[1]:g}"
        say(f"Loaded {name} ({concept.superclass}), {gate}, from {named}.")
    return names


def _by_name(values: list[tuple[str | None, float]], names: list[str], flag: str) -> dict[str, float]:
    """Turn (name or None, number) pairs into a number for each name; those with a name win."""
    given = [name for name, _ in values]
    unknown = [name for name in given if name is not None and name not in names]
    if unknown:
        raise ValueError(f"`{flag}` must name one of the loaded concepts {names}, got {unknown}.")
    everyone = {name: value for key, value in values if key is None for name in names}
    return everyone | {name: value for name, value in values if name is not None}
