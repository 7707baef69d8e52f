"""`perfusion covariance`: estimate a model's input covariance, or find it in the cache."""

import time
from argparse import ArgumentParser, Namespace
from pathlib import Path

from perfusion_pytorch.cli.base_model import (
    captions_of,
    check_captions,
    device_of,
    dtype_of,
    load_pipeline,
    ridge_of,
)
from perfusion_pytorch.cli.command import MODEL, Command, Say
from perfusion_pytorch.cli.flag_types import count
from perfusion_pytorch.cli.shared_flags import add_covariance_flags, add_hardware_flags, add_model_flags
from perfusion_pytorch.files import check_can_be_written
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.pipelines.covariance_cache import (
    BATCH_SIZE,
    cache_folder,
    cached_covariance,
    covariance_path,
)
from perfusion_pytorch.user_warnings import warn_user


def add_covariance_command_flags(parser: ArgumentParser) -> None:
    """Add the flags of `perfusion covariance`."""
    add_model_flags(parser)
    add_hardware_flags(parser, precision="float32")
    group = parser.add_argument_group("covariance")
    add_covariance_flags(group)
    group.add_argument("--batch_size", type=count, default=BATCH_SIZE, metavar="N", help="captions at a time")
    group.add_argument("--no_progress", action="store_true", help="show no progress bar")
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="also write it to this file, for `perfusion train --covariance FILE`",
    )


def run_covariance(args: Namespace, say: Say) -> None:
    """Estimate an input covariance, or find it in the cache."""
    started = time.monotonic()
    check_captions(args)
    device = device_of(args)
    cannot_cache = _check_outputs(args)
    pipe = load_pipeline(args, dtype=dtype_of(args, default="float32"), device=device)
    captions = captions_of(args, pipe)
    where = {"cache_dir": args.cache_dir, "ridge": ridge_of(args)}
    path = covariance_path(pipe, captions, **where)
    was_there = _is_whole(path)
    if cannot_cache and not was_there and args.output is None:
        raise cannot_cache
    covariance = cached_covariance(
        pipe, captions, **where, batch_size=args.batch_size, progress=not args.no_progress
    )
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        covariance.save(args.output)
    if covariance.num_tokens < covariance.dim:
        warn_user(
            f"{covariance.num_tokens} tokens cannot fill {covariance.dim} dimensions, so the covariance "
            "measures its ridge. Use more captions: the paper took 100,000."
        )
    how = "found in the cache" if was_there else "computed"
    say(
        f"Input covariance of {covariance.num_tokens:,} tokens of {len(captions):,} "
        f"{'caption' if len(captions) == 1 else 'captions'}, "
        f"{how} in {time.monotonic() - started:.1f} s."
    )
    say(f"  text encodings    {covariance.dim} features")
    say(f"  condition number  {covariance.condition_number:.1e} with a ridge of {covariance.ridge:g}")
    if was_there or not cannot_cache:
        say(f"  cached in         {path}")
    if args.output is not None:
        say(f"  written to        {args.output}")


def _is_whole(path: Path) -> bool:
    """Return whether there is a covariance file; a damaged one is computed and written again."""
    try:
        InputCovariance.load(path)
    except (ValueError, OSError):
        return False
    return True


def _check_outputs(args: Namespace) -> OSError | None:
    """Check that the result can be written, before the model is loaded.

    Returns:
        Why it cannot be cached, or None. It is an error unless the covariance is there already.
    """
    if args.output is not None:
        check_can_be_written(args.output)
    folder = cache_folder(args.cache_dir)
    try:
        check_can_be_written(folder, is_folder=True)
    except OSError as error:
        error = OSError(f"{error} Choose another one by --cache_dir, or write it to a file by --output.")
        if args.output is None and not list(folder.glob("covariance-*")):
            raise error from None
        return error
    return None


COMMAND = Command(
    name="covariance",
    usage="--pretrained_model_name_or_path MODEL [flags]",
    help="compute a model's input covariance beforehand",
    description=(
        "Compute the input covariance of a model's text encoder from captions, once. "
        "`perfusion train` also does it."
    ),
    example=f"  perfusion covariance {MODEL}",
    add_flags=add_covariance_command_flags,
    run=run_covariance,
)
