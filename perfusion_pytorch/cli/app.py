"""`perfusion app`: a page in the browser to train concepts, make pictures with them and evaluate them."""

import time
from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

from perfusion_pytorch.app.catalogue import Catalogue, concepts_in
from perfusion_pytorch.app.guard import LOCAL
from perfusion_pytorch.app.runs import Runs
from perfusion_pytorch.app.serve import HOST, prepare, serve
from perfusion_pytorch.app.shared import Page, defaults_of, examples_in
from perfusion_pytorch.app.studio import Studio
from perfusion_pytorch.cli.base_model import device_of, dtype_of, load_pipeline
from perfusion_pytorch.cli.command import Command, Say
from perfusion_pytorch.cli.flag_types import count, not_empty
from perfusion_pytorch.cli.shared_flags import add_hardware_flags
from perfusion_pytorch.evaluation.measures import CLIP_MODEL, DINO_MODEL
from perfusion_pytorch.extras import required
from perfusion_pytorch.training.interruption import termination_as_interrupt
from perfusion_pytorch.user_warnings import warn_user

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"  # in a clone
OF_CLONE: dict[str, Any] = {"guidance": 3.0, "prompt": "a {} on a green background"}  # its small model's


def add_app_flags(parser: ArgumentParser) -> None:
    """Add the flags of `perfusion app`."""
    group = parser.add_argument_group("model and concepts")
    group.add_argument(
        "--pretrained_model_name_or_path",
        nargs="+",
        type=not_empty,
        metavar="MODEL",
        help="folders in diffusers' format, names on the model hub, or .safetensors files "
        "(default: the small model of the repository)",
    )
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument("--variant", help="variant of the weight files, such as fp16")
    group.add_argument(
        "--concept",
        nargs="+",
        action="extend",
        default=[],
        type=Path,
        metavar="FILE",
        help="concept files, or folders of them, that the page offers",
    )
    group.add_argument(
        "--mask_model",
        metavar="MODEL",
        help="let the page make masks with this CLIPSeg model, see `perfusion train`",
    )
    for name, default in (("clip", CLIP_MODEL), ("dino", DINO_MODEL)):
        group.add_argument(
            f"--{name}_model",
            default=default,
            type=not_empty,
            metavar="MODEL",
            help=f"let the page measure pictures with this {name.upper()} model, see `perfusion evaluate`",
        )
    add_hardware_flags(parser, precision="float16 on CUDA devices, float32 elsewhere")
    group = parser.add_argument_group("server")
    group.add_argument(
        "--output_dir",
        type=Path,
        default=Path("perfusion_app"),
        metavar="FOLDER",
        help="for uploads, pictures, trainings and evaluations",
    )
    group.add_argument(
        "--host", default=HOST, help="address to listen on; others than this machine's let others in"
    )
    group.add_argument("--port", type=count, help="by default the first free one from 7860")


def run_app(args: Namespace, say: Say) -> None:
    """Serve the page until Ctrl-C or SIGTERM."""
    required("gradio")
    models = args.pretrained_model_name_or_path
    is_of_clone = models is None
    if models is None:
        if not SHAPES.exists():
            raise ValueError(
                "`pretrained_model_name_or_path` must name a model, since this is not a clone of the "
                "repository, which has a small one."
            )
        models = [str(SHAPES / "tiny-sd")]
        args.concept = args.concept or [SHAPES / "concepts"]
    if args.host not in LOCAL:
        warn_user(f"--host {args.host} lets everyone who can reach this machine use the page.")
    page = make_page(args, models, OF_CLONE if is_of_clone else {})
    with termination_as_interrupt():
        url, close = serve(page, host=args.host, port=args.port)
        say(f"The page is at {url} (Ctrl-C ends it). Its files are in {args.output_dir}.")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            say("Closing; a run that is going on writes a checkpoint first.")
        finally:
            close()


def make_page(args: Namespace, models: list[str], filled: dict[str, Any]) -> Page:
    """Load the first model and the concepts' descriptions, and return the page, not built yet.

    Args:
        args: the command's flags.
        models: the base models that the page offers.
        filled: what the page is filled with, beside what the model says.
    """
    device = device_of(args)
    dtype = dtype_of(args, default="float16" if device.type == "cuda" else "float32")
    offers = concepts_in(args.concept)
    loaders, flags, examples = {}, {}, {}
    for model in models:
        path = Path(model).expanduser()
        name = path.resolve().name if path.exists() else model
        name = model if name in loaders else name
        given = Namespace(pretrained_model_name_or_path=model, revision=args.revision, variant=args.variant)
        loaders[name] = partial(_load, given, dtype, device)
        where = path.resolve() if path.exists() else model
        flags[name] = [f"--pretrained_model_name_or_path={where}"]
        flags[name] += [f"--{key}={vars(args)[key]}" for key in ("revision", "variant") if vars(args)[key]]
        if path.resolve() == (SHAPES / "tiny-sd").resolve() and SHAPES.exists():
            examples[name] = examples_in(SHAPES)
    studio = Studio(loaders)
    with studio.pipeline(next(iter(loaders))) as pipe:
        defaults = defaults_of(pipe, precision="fp16" if device.type == "cuda" else "no", **filled)
    folder = prepare(args.output_dir / "uploads")
    runs = Runs(args.output_dir.resolve() / "runs")
    return Page(
        studio,
        Catalogue(offers, runs),
        runs,
        folder,
        flags,
        defaults,
        args.mask_model,
        _judge(args.clip_model),
        _judge(args.dino_model),
        examples,
    )


def _judge(model: str) -> str:
    """Return a model's name, or its folder as it is found from anywhere."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else model


def _load(given: Namespace, dtype: Any, device: Any) -> Any:
    pipe = load_pipeline(given, dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


COMMAND = Command(
    name="app",
    usage="[--pretrained_model_name_or_path MODEL ...] [--concept FILE ...] [flags]",
    help="a page in the browser for all of this",
    description=(
        "Serve a page on this machine: make pictures with concepts, train, and evaluate.\n"
        "Without flags, in a clone of the repository, it opens on the small model and its concepts."
    ),
    example="  perfusion app --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5",
    add_flags=add_app_flags,
    run=run_app,
)
