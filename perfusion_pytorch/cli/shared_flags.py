"""Flags that several commands have: the base model and its hardware, concepts, captions, sampling."""

import argparse
from argparse import ArgumentParser
from pathlib import Path

from perfusion_pytorch.cli.flag_types import (
    count,
    gate_value,
    not_empty,
    not_negative,
    number,
    seed,
    temperature_value,
)
from perfusion_pytorch.pipelines.covariance_cache import RIDGE


def add_model_flags(parser: ArgumentParser) -> None:
    """Add the flags that name the base model."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        type=not_empty,
        metavar="MODEL",
        help="folder in diffusers' format, name on the model hub, or one .safetensors file",
    )
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--variant", help="variant of the weight files, such as fp16")


def add_hardware_flags(parser: ArgumentParser, *, precision: str) -> None:
    """Add the flags for device and precision.

    Args:
        parser: a command's parser.
        precision: the default, in words.
    """
    group = parser.add_argument_group("hardware")
    group.add_argument("--device", help="such as cuda, cuda:1, mps or cpu (default: the fastest available)")
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help=f"precision of the weights (default: {precision})",
    )


def add_concept_flags(group: argparse._ArgumentGroup, *, required: bool) -> None:
    """Add the flags that name concept files and set their gates."""
    group.add_argument(
        "--concept",
        nargs="+",
        action="extend",
        default=[],
        required=required,
        metavar="FILE",
        help="concept files, training runs' folders, or names on the hub: user/name, "
        "user/name/file.safetensors, user/name@revision. What exists here goes first",
    )
    bias = "gate bias: lower shows more of a concept, higher follows the prompt more closely"
    for name, read, what in (
        ("beta", gate_value, bias),
        ("temperature", temperature_value, "gate temperature, above 0"),
    ):
        group.add_argument(
            f"--{name}",
            nargs="+",
            action="extend",
            type=read,
            default=[],
            metavar="VALUE",
            help=f'{what}; a number for all concepts, or "<token>=number" for one (default: from the files)',
        )


def add_covariance_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags for the captions that a covariance is estimated from, and its cache."""
    group.add_argument(
        "--captions",
        type=Path,
        metavar="FILE",
        help="text file of captions, one a line (default: the model's own, else 100,000 built-in ones)",
    )
    group.add_argument("--num_captions", type=count, metavar="N", help="use only the first N")
    group.add_argument(
        "--ridge", type=not_negative, help=f"λ: adds λ tr(C)/d to the diagonal (default: {RIDGE:g})"
    )
    group.add_argument(
        "--cache_dir",
        type=Path,
        metavar="FOLDER",
        help="the cache's folder (default: $PERFUSION_CACHE or ~/.cache/perfusion_pytorch)",
    )


def add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say how each picture is made."""
    group.add_argument(
        "--seed", type=seed, default=0, help="picture i of a prompt starts from noise number seed + i"
    )
    for name, read, metavar, what in (
        ("num_inference_steps", count, "N", "denoising steps (default: the pipeline's)"),
        ("guidance_scale", number, "G", "classifier-free guidance (default: the pipeline's)"),
        ("resolution", count, "PIXELS", "edge (default: the model's own)"),
    ):
        group.add_argument(f"--{name}", type=read, metavar=metavar, help=what)
    group.add_argument(
        "--batch_size",
        type=count,
        default=1,
        metavar="N",
        help="pictures made at a time; the pictures do not depend on it",
    )
