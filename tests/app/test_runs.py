"""Runs of the page: processes that are stopped, resumed and watched, and whose end the page survives."""

import json
import os
import signal
import sys
import time

import pytest

from perfusion_pytorch.app import runs as module
from perfusion_pytorch.app.run_kinds import EVALUATION, TRAINING
from perfusion_pytorch.app.runs import Runs

# In the place of `perfusion train`: ten quick steps, a checkpoint where it is stopped, and ways to fail.
STAND_IN = """
import os, pathlib, signal, sys, time
flags = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
folder = pathlib.Path(flags["output_dir"])
(folder / "argv.txt").write_text("\\n".join(sys.argv[1:]))
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
if flags["mode"] == "error":
    print("perfusion: error: the car has four wheels. Draw them. (--verbose shows where)", flush=True)
    sys.exit(1)
done = max([int(p.name[11:]) for p in folder.glob("checkpoint-*")], default=0)
for step in range(done + 1, 11):
    print(f"step {step} of 10, loss {1 / step:.4f}", flush=True)
    if flags["mode"] == "crash" and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    if stopped:
        (folder / f"checkpoint-{step}").mkdir()
        print(f"perfusion: Stopped; {folder}/checkpoint-{step} was written.", file=sys.stderr)
        sys.exit(130)
(folder / "concept.safetensors").write_bytes(b"it")
"""


# In the place of `perfusion evaluate`: a bar of seven pictures, which can be stopped.
BARS = r"""
import pathlib, signal, sys, time
flags = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
folder = pathlib.Path(flags["output_dir"])
pictures = folder / "pictures" / "base"
pictures.mkdir(parents=True, exist_ok=True)
stopped = []
signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
for number in range(len(list(pictures.iterdir())), 8):
    share = f"{number / 7:4.0%}|{'█' * number:10}| {number}/7"
    print(f"\rpictures: {share} [00:01<00:02,  1.6picture/s, car β 0.5]", end="", file=sys.stderr, flush=True)
    time.sleep(0.1)
    if stopped:
        print(f"\nperfusion: Stopped. The pictures in {folder} are kept.", file=sys.stderr)
        sys.exit(130)
    if number < 7:
        (pictures / f"{number}.png").write_bytes(b"it")
if flags["mode"] == "error":
    print(f"\nperfusion: error: {folder}/pictures cannot be read. (--verbose shows where)", file=sys.stderr)
    sys.exit(1)
(folder / "grid.png").write_bytes(b"it")
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-S", str(tmp_path / "stand_in.py")))
    runs = Runs(tmp_path / "runs")
    yield runs
    runs.close()


def new(runs, mode="good", token="<Ca r/../1>"):
    return runs.record(runs.new_folder(token), {"token": token, "steps": 10}, [f"--mode={mode}"])


def wait(runs, name, condition):
    """Wait until a condition holds of a run's progress, and return it."""
    end = time.monotonic() + 60
    while not condition(now := runs.progress(name)):
        assert time.monotonic() < end, now
        time.sleep(0.02)
    return now


def test_a_run_is_stopped_with_a_checkpoint_and_resumed_from_it(runs):
    name = new(runs)
    assert runs.progress(name).state == "stopped" and runs.names() == [name]
    runs.start(name)
    wait(runs, name, lambda now: now.step >= 2)
    runs.stop(name)
    stopped = wait(runs, name, lambda now: now.state != "running")
    assert (stopped.state, stopped.result) == ("stopped", None) and 2 <= stopped.step < 10
    assert (
        stopped.message == f"Stopped with a checkpoint after step {stopped.step}. Resume goes on from there."
    )
    runs.start(name)
    finished = wait(runs, name, lambda now: now.state != "running")
    assert finished.state == "finished" and finished.result == runs.folder / name / "concept.safetensors"
    assert [step for step, _ in finished.losses] == list(range(1, 11)) and finished.losses[3] == (4, 0.25)
    # A page that is started anew finds the run as it is.
    assert Runs(runs.folder).progress(name) == finished


def test_a_crash_is_told_and_the_run_can_be_started_again(runs):
    name = new(runs, "crash")
    runs.start(name)
    now = wait(runs, name, lambda now: now.state != "running")
    assert (now.state, now.step) == ("failed", 3)
    assert now.message == "The run ended by signal 9 before the first checkpoint. Resume tries again."
    runs.start(name)
    assert runs.is_running(name)


def test_an_error_is_shown_as_the_command_says_it(runs):
    name = new(runs, "error")
    runs.start(name)
    now = wait(runs, name, lambda now: now.state != "running")
    assert (now.state, now.message) == ("failed", "the car has four wheels. Draw them.")


def test_only_one_run_goes_on_at_a_time(runs):
    first, second = new(runs), new(runs)
    assert (first, second) == ("ca-r-1-run1", "ca-r-1-run2")
    runs.start(first)
    with pytest.raises(ValueError, match=rf"^{first} is going on\. Stop it first"):
        runs.start(second)


def test_a_run_gets_its_folders_after_its_flags_and_its_own_log(runs):
    name = new(runs, "error")
    runs.start(name)
    wait(runs, name, lambda now: now.state != "running")
    folder = runs.folder / name
    assert (folder / "argv.txt").read_text().split("\n") == [
        "train",
        "--mode=error",
        f"--output_dir={folder}",
        f"--instance_data_dir={folder / 'pictures'}",
        "--resume_from_checkpoint=latest",
    ]
    assert json.loads((folder / "run.json").read_text())["token"] == "<Ca r/../1>"


def test_closing_stops_the_run_that_goes_on(runs):
    name = new(runs)
    runs.start(name)
    wait(runs, name, lambda now: now.step >= 1)
    runs.close()
    assert runs.progress(name).state == "stopped" and list((runs.folder / name).glob("checkpoint-*"))


@pytest.fixture
def evaluations(tmp_path, monkeypatch):
    (tmp_path / "bars.py").write_text(BARS, encoding="utf-8")
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-S", "-X", "utf8", str(tmp_path / "bars.py")))
    runs = Runs(tmp_path / "runs")
    yield runs
    runs.close()


def new_evaluation(runs, mode="good"):
    return runs.record(runs.new_folder("<car-1>", EVALUATION), {"steps": 7}, [f"--mode={mode}"], EVALUATION)


def test_an_evaluation_is_stopped_and_makes_what_is_missing(evaluations):
    name = new_evaluation(evaluations)
    assert name == "car-1-evaluation1" and evaluations.names(EVALUATION) == [name]
    assert evaluations.names(TRAINING) == []
    evaluations.start(name)
    now = wait(evaluations, name, lambda now: now.step >= 2)
    assert now.message == "Making the pictures of car β 0.5." and now.counted == f"{now.step} of 7 pictures"
    evaluations.stop(name)
    stopped = wait(evaluations, name, lambda now: now.state != "running")
    made = len(list(evaluations.folder.glob("*/evaluation/pictures/base/*.png")))
    assert stopped.state == "stopped" and stopped.result is None and 2 <= made < 7
    assert stopped.message == f"Stopped with {made} pictures made. Resume goes on from there."
    evaluations.start(name)
    finished = wait(evaluations, name, lambda now: now.state != "running")
    assert (finished.state, finished.counted, finished.losses) == ("finished", "7 of 7 pictures", [])
    assert finished.result == evaluations.folder / name / "evaluation" / "grid.png"
    assert Runs(evaluations.folder).progress(name) == finished


def test_an_evaluations_error_is_shown_without_the_runs_folder(evaluations):
    name = new_evaluation(evaluations, "error")
    evaluations.start(name)
    now = wait(evaluations, name, lambda now: now.state != "running")
    assert (now.state, now.message) == ("failed", "evaluation/pictures cannot be read.")


def test_a_training_and_an_evaluation_do_not_go_on_together(evaluations):
    name, other = new_evaluation(evaluations), new(evaluations)
    evaluations.start(name)
    with pytest.raises(ValueError, match=rf"^{name} is going on\. Stop it first"):
        evaluations.start(other)


def test_a_run_that_cannot_be_started_leaves_nothing(evaluations):
    evaluations.start(new_evaluation(evaluations))
    with pytest.raises(ValueError, match="is going on"), evaluations.new("more") as folder:
        evaluations.record(folder, {"steps": 1}, [])
    with pytest.raises(OSError, match="no disk"), evaluations.new("more"):
        raise OSError("no disk")
    assert [path.name for path in evaluations.folder.iterdir()] == ["car-1-evaluation1"]


def test_what_an_evaluation_does_beside_pictures_is_said():
    bar = "pictures: 100%|██████████| 7/7 [00:01<00:00,  1.65s/picture, a, b β 0.5]"
    assert EVALUATION.doing("") == "Starting: Python loads its packages."
    assert EVALUATION.doing("perfusion: warning: a") == "Preparing: the model, the files and the judges."
    assert EVALUATION.doing(bar.replace("100%", " 90%")) == "Making the pictures of a, b β 0.5."
    assert EVALUATION.doing(bar) == "Measuring the pictures."


@pytest.mark.parametrize("name", ["..", "/etc", "../runs", "", "unknown"])
def test_a_name_that_is_not_a_runs_leads_nowhere(runs, name):
    new(runs)
    for call in (runs.path, runs.about, runs.start, runs.progress):
        with pytest.raises(ValueError, match=r"There is no run .* Choose one of \['ca-r-1-run1'\]"):
            call(name)
    assert runs.stop(name) is None


@pytest.mark.skipif(os.name != "posix", reason="process groups are of POSIX")
def test_ctrl_c_in_the_terminal_reaches_the_page_alone(runs):
    name = new(runs)
    runs.start(name)
    process = runs._processes[name]
    assert os.getpgid(process.pid) != os.getpgid(0)
    process.send_signal(signal.SIGINT)


def test_the_number_of_runs_is_bounded(runs, monkeypatch):
    monkeypatch.setattr(module, "MOST_RUNS", 1)
    new(runs)
    with pytest.raises(ValueError, match=r"holds 1 runs\. Delete some of its folders"):
        runs.new_folder("<a>")
