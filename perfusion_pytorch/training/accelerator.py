"""accelerate, as a training run uses it: devices, processes, mixed precision and trackers."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from perfusion_pytorch.extras import required
from perfusion_pytorch.protocols import StableDiffusion

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

PRECISION_OF_WEIGHTS = {torch.float16: "fp16", torch.bfloat16: "bf16"}
PACKAGE_OF_TRACKER = {"comet_ml": "comet-ml"}  # where its name differs from the tracker's
SHARDED = ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA")  # kinds of distributed training that split models up


def process_state() -> "PartialState":
    """Return accelerate's state of this process: its device, and the number of processes.

    On a machine without an accelerator, accelerate must be asked for the CPU: otherwise it takes each process
    of `torchrun` for the only one.
    """
    if hasattr(torch, "accelerator"):
        has_accelerator = torch.accelerator.is_available()
    else:
        has_accelerator = torch.cuda.is_available()
    return required("accelerate").PartialState(**({} if has_accelerator else {"cpu": True}))


def make_accelerator(
    pipe: StableDiffusion, mixed_precision: str | None, report_to: str | None, logging_folder: Path
) -> "Accelerator":
    """Return accelerate's Accelerator. A second one in a process may have another precision than the first.

    Args:
        pipe: the pipeline; the dtype of its weights decides where no precision is given.
        mixed_precision: "no", "fp16" or "bf16".
        report_to: name of a tracker, or "all", "none" or None.
        logging_folder: where the tracker writes.

    Raises:
        ValueError: the precision or the tracker is not available here, or accelerate is configured to split
            models up.
        RuntimeError: torch.distributed runs, but from a launcher that accelerate does not understand.
    """
    accelerate = required("accelerate")
    state = process_state()
    precision = mixed_precision or PRECISION_OF_WEIGHTS.get(pipe.unet.dtype, "no")
    if precision == "fp16" and state.device.type == "cpu":
        raise ValueError(
            "`mixed_precision` must be 'no' or 'bf16' on a CPU, got 'fp16'. "
            "Choose one of these, for a pipeline in bfloat16 or float32."
        )
    report_to = None if report_to == "none" else report_to
    _check_tracker(report_to)
    known = accelerate.state.AcceleratorState
    if known._shared_state and known().mixed_precision != precision:
        known._reset_state()  # the state of the processes stays
    accelerator = accelerate.Accelerator(
        mixed_precision=precision, log_with=report_to, project_dir=str(logging_folder)
    )
    # Another Accelerator of this process may be mid-accumulation.
    accelerator.gradient_state._set_sync_gradients(True)
    _check_processes(accelerator)
    return accelerator


def _check_tracker(report_to: str | None) -> None:
    if report_to is None:
        return
    tracking = required("accelerate.tracking")
    known = sorted(tracking.LOGGER_TYPE_TO_CLASS)
    installed = sorted(str(tracker) for tracker in tracking.get_available_trackers())
    if report_to not in (*known, "all"):
        raise ValueError(
            f"`report_to` must be one of {', '.join(known)}, 'all' or 'none', got {report_to!r}. "
            f"Installed are {installed}."
        )
    if report_to == "all" and not installed:
        raise ValueError(
            "`report_to` is 'all', but no tracker is installed. Leave it out, or install one of "
            f"{', '.join(known)}."
        )
    if report_to in known and report_to not in installed:
        raise ValueError(
            f"`report_to` must be an installed tracker, {installed}, got {report_to!r}. "
            f"Run pip install {PACKAGE_OF_TRACKER.get(report_to, report_to)}."
        )


def _check_processes(accelerator: "Accelerator") -> None:
    """Raise an error where accelerate splits models up, or does not see all processes."""
    kind = accelerator.distributed_type.value
    if kind in SHARDED:
        raise ValueError(
            f"accelerate must run plain data parallelism, since a concept is small, got {kind}. "
            "Choose 'no' for it in `accelerate config`."
        )
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    running = distributed.get_world_size()
    if running != accelerator.num_processes:
        raise RuntimeError(
            f"torch.distributed runs {running} processes, but accelerate sees {accelerator.num_processes}. "
            "Start them with `torchrun` or `accelerate launch`; without a GPU, set ACCELERATE_USE_CPU=true."
        )


@contextmanager
def own_modes(device: torch.device) -> Iterator[None]:
    """Train within the block whatever the caller's code is in: `no_grad`, `inference_mode` or autocast.

    Precision is a matter of the run's own options.
    """
    with ExitStack() as modes:
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        if torch.amp.is_autocast_available(device.type):
            modes.enter_context(torch.autocast(device.type, enabled=False))
        yield


@contextmanager
def trackers(accelerator: "Accelerator", settings: Mapping[str, Any]) -> Iterator[None]:
    """Start the trackers with a run's settings, and finish them after it."""
    if accelerator.log_with:
        simple = {name: value for name, value in settings.items() if isinstance(value, (int, float, str))}
        accelerator.init_trackers("perfusion", simple)
    try:
        yield
    finally:
        # `end_training` would also end the process group, which may belong to the user.
        for tracker in accelerator.trackers:
            tracker.finish()
