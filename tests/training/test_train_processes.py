"""Training in real processes: killed and resumed, interrupted, and two at once."""

import multiprocessing
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from helpers.ranks import join, leave_together
from helpers.tiny_pipes import IMAGES, SETTLED, assert_same_runs, options_for, tiny_pipe
from safetensors.torch import load_file

from perfusion_pytorch import train_concept
from perfusion_pytorch.training.checkpoints import (
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from perfusion_pytorch.training.options import PAPER
from perfusion_pytorch.training.run_folder import lock, unlock

pytestmark = pytest.mark.slow

STEPS = 60
OPTIONS = {"max_train_steps": STEPS, "checkpointing_steps": 2, "checkpoints_total_limit": 3}


@pytest.fixture(scope="module")
def processes():
    """Processes that start quickly: forks of a server that has imported everything and nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["helpers.tiny_pipes", "perfusion_pytorch.training.train", "diffusers", "transformers", "accelerate"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", str(Path(__file__).parents[1])
        )  # where the server finds the first of these
        yield context


def run(output_dir, options, resume):
    """A run in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    train_concept(tiny_pipe(), IMAGES, **options_for(output_dir, **options), resume_from_checkpoint=resume)


def newest(folder):
    return max((int(path.name.removeprefix("checkpoint-")) for path in checkpoints_in(folder)), default=0)


def wait_for(condition, process):
    """Wait until a condition holds; False if the process ended first."""
    for _ in range(60_000):
        if condition():
            return True
        if not process.is_alive():
            return False
        time.sleep(0.001)
    raise AssertionError("it takes a minute")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_as_one_that_is_not(processes, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = processes.Process(target=run, args=(whole, OPTIONS, None))
    undisturbed.start(), undisturbed.join()
    assert undisturbed.exitcode == 0
    delays, kills, partial = random.Random(0), [], 0
    for _ in range(50):
        process = processes.Process(target=run, args=(killed, OPTIONS, "latest"))
        before = newest(killed)
        process.start()
        if not wait_for(lambda before=before: newest(killed) > before, process) or len(kills) >= 8:
            process.join()
            assert process.exitcode == 0
            break
        if len(kills) % 2:  # now and then, while a checkpoint is written
            wait_for(lambda: any(killed.glob(".checkpoint-*")), process)
            time.sleep(delays.uniform(0, 0.01))
        else:
            time.sleep(delays.uniform(0, 0.05))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills.append(newest(killed))
            partial += any(killed.glob(".checkpoint-*"))
    assert len(kills) >= 5 and len(set(kills)) >= 5 and kills[-1] < STEPS, (kills, partial)
    assert_same_runs(whole, killed, STEPS)
    assert sorted(os.listdir(whole)) == sorted(os.listdir(killed))
    assert [path.name for path in checkpoints_in(killed)] == [
        "checkpoint-56",
        "checkpoint-58",
        "checkpoint-60",
    ]


def save_and_die(folder, number):
    """Save a checkpoint, but be killed at a file operation of that number."""
    count = 0

    def die(event, arguments):
        nonlocal count
        if event.split(".")[0] in ("open", "os", "shutil") and any(
            str(folder) in str(argument) for argument in arguments
        ):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    save_checkpoint(folder, 4, {"a": torch.ones(3)}, {}, limit=1)


def test_a_kill_at_any_file_operation_leaves_the_old_checkpoint_or_the_new(processes, tmp_path):
    steps = []
    for number in range(1, 100):
        folder = tmp_path / str(number)
        save_checkpoint(folder, 2, {"a": torch.zeros(3)}, {})
        process = processes.Process(target=save_and_die, args=(folder, number))
        process.start(), process.join()
        _, about = load_checkpoint(find_checkpoint(folder, "latest"))
        steps.append(about["step"])
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert steps == sorted(steps) and steps.count(2) >= 5 and steps.count(4) >= 3
    assert os.listdir(folder) == ["checkpoint-4"]


def interrupted(output_dir, options):
    try:
        run(output_dir, options, None)
    except KeyboardInterrupt as stop:
        os._exit(99 if "Resume from 'latest'" in str(stop) else 1)


def test_ctrl_c_at_any_moment_ends_a_process_with_a_checkpoint(processes, tmp_path):
    process = processes.Process(target=interrupted, args=(tmp_path, OPTIONS | {"max_train_steps": 10**6}))
    process.start()
    assert wait_for(lambda: newest(tmp_path) > 0, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert (
        process.exitcode == 99
        and len(checkpoints_in(tmp_path)) >= 1
        and not (tmp_path / "concept.safetensors").exists()
    )


def work(rank, count, folder, kind, options, interrupt_at):
    """One of several processes of a run."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {key: str(value) for key, value in environment.items()}
    torch.set_num_threads(1)
    join(folder, rank, count)
    from perfusion_pytorch.training.step import Trainer

    step = Trainer.step

    def interrupted(self, number, interruption):
        if (number, rank) == (interrupt_at, 1):
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number, interruption)

    Trainer.step = interrupted
    try:
        train_concept(tiny_pipe(kind), IMAGES, **options_for(folder / "joint", kind, **options))
    except KeyboardInterrupt:
        (folder / f"stopped-{rank}").touch()
    leave_together(folder, rank, count)


def joint_run(processes, folder, kind, options, count=2, interrupt_at=None):
    started = [
        processes.Process(target=work, args=(rank, count, folder, kind, options, interrupt_at))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    assert [process.exitcode for process in started] == [0] * count


PROMPTS = [
    "a {}",
    "a photo of a {} on red",
    "a {} on a blue background",
]  # the concept stands elsewhere in each


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SD 1", "SDXL"])
@pytest.mark.parametrize("way", [PAPER, SETTLED], ids=["joint", "settled"])
def test_two_processes_train_the_concept_of_one_with_twice_the_batch(way, kind, processes, tmp_path):
    options = way | {
        "max_train_steps": 6,
        "checkpointing_steps": 6,
        "templates": PROMPTS,
        "max_grad_norm": 0.5,
    }
    options |= {"validation_prompt": "a <car-1>", "num_validation_images": 1}
    # As large as the gradients: else Adam makes a full step of a gradient that is rounding alone.
    options |= {"adam_epsilon": 1e-5}
    joint_run(processes, tmp_path, kind, options | {"train_batch_size": 2})
    train_concept(
        tiny_pipe(kind), IMAGES, **options_for(tmp_path / "one", kind, **options, train_batch_size=4)
    )
    joint, one = (
        load_file(tmp_path / run / "checkpoint-6" / "state.safetensors") for run in ("joint", "one")
    )
    assert joint.keys() == one.keys()
    errors = {}
    for name, tensor in one.items():
        scale = tensor.float().abs().max().clamp_min(1e-12).item()
        errors[name] = (joint[name].float() - tensor.float()).abs().max().item() / scale
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])


def test_ctrl_c_in_one_of_two_processes_stops_both_at_one_step(processes, tmp_path):
    options = {"max_train_steps": 50, "checkpointing_steps": None, "train_batch_size": 2}
    joint_run(processes, tmp_path, "SD 1", options, interrupt_at=3)
    assert {"stopped-0", "stopped-1"} <= set(os.listdir(tmp_path))
    assert [path.name for path in checkpoints_in(tmp_path / "joint")] == ["checkpoint-4"]


def test_two_processes_are_both_refused_where_another_run_has_the_folder(processes, tmp_path):
    """And neither waits for the other."""
    (tmp_path / "joint").mkdir()
    file = lock(tmp_path / "joint")
    started = [processes.Process(target=work, args=(r, 2, tmp_path, "SD 1", {}, None)) for r in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert all(process.exitcode not in (None, 0) for process in started)
    unlock(tmp_path / "joint", file)
    assert os.listdir(tmp_path / "joint") == []
