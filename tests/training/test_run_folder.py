"""The folder of a run: locked against a second run in it, and not left behind empty."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers.tiny_pipes import IMAGES, options_for, tiny_pipe

from perfusion_pytorch import train_concept
from perfusion_pytorch.training import run_folder as module
from perfusion_pytorch.training.run_folder import LOCK, lock, run_folder, unlock

ALONE = SimpleNamespace(is_main_process=True, num_processes=1)
HOLDER = """
import sys, time
from pathlib import Path
from perfusion_pytorch.training.run_folder import lock
file = lock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(100)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has locked a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_second_run_ends_at_once_and_names_the_first(holder, tmp_path):
    options = options_for(tmp_path, covariance=lambda: pytest.fail("the covariance was computed"))
    match = f"in use by another run, but .* is, by process {holder.pid} on {socket.gethostname()} since 20"
    with pytest.raises(ValueError, match=match):
        train_concept(tiny_pipe(), IMAGES, **options)
    assert os.listdir(tmp_path) == [LOCK]  # the first one's


@pytest.mark.slow
def test_the_lock_of_a_dead_process_is_taken_over(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert json.loads((tmp_path / LOCK).read_text())["process"] == holder.pid
    file = lock(tmp_path)
    about = json.loads((tmp_path / LOCK).read_text())
    assert (about["process"], about["host"]) == (os.getpid(), socket.gethostname())
    unlock(tmp_path, file)
    assert os.listdir(tmp_path) == []


def test_a_run_in_the_same_process_is_refused_too(tmp_path):
    def second():
        with pytest.raises(ValueError, match=f"in use by another run, .* by process {os.getpid()} on"):
            train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path))
        raise MemoryError("the first one ends")

    with pytest.raises(MemoryError):
        train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path, covariance=second))
    train_concept(tiny_pipe(), IMAGES, **options_for(tmp_path))  # afterwards it is free
    assert LOCK not in os.listdir(tmp_path)


def test_a_lock_that_ends_while_another_waits_for_it_is_not_mistaken_for_the_new_one(tmp_path, monkeypatch):
    """The file may be removed between opening and locking: then the next one is locked."""
    first, take, calls = lock(tmp_path), module._take, []

    def late(file):
        if not calls:
            unlock(tmp_path, first)
        calls.append(file)
        return take(file)

    monkeypatch.setattr(module, "_take", late)
    file = lock(tmp_path)
    assert len(calls) == 2 and os.path.samestat((tmp_path / LOCK).stat(), os.fstat(file.fileno()))
    unlock(tmp_path, file)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def none(file):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module, "_take", none)
    with (
        pytest.warns(UserWarning, match="cannot be locked .*not implemented.*no second run uses it"),
        run_folder(tmp_path / "a", 0, ALONE) as folder,
    ):
        assert folder == tmp_path / "a" and os.listdir(folder) == []


def test_all_processes_of_a_run_share_its_lock(tmp_path, monkeypatch):
    """The main one locks; what it finds is told to the others."""
    news = []
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda values: news or values)
    main, other = (SimpleNamespace(is_main_process=main, num_processes=2) for main in (True, False))
    with run_folder(tmp_path, 0, main), run_folder(tmp_path, 0, other):
        assert os.listdir(tmp_path) == [LOCK]
    news.append("`output_dir` must not be in use")
    with pytest.raises(ValueError, match="must not be in use"), run_folder(tmp_path, 0, other):
        pass


def test_an_empty_folder_does_not_stay_after_a_refused_call(tmp_path):
    output = tmp_path / "new" / "run"
    for wrong in ({"images": []}, {"templates": ["a photo"]}, {"resume_from_checkpoint": "checkpoint-3"}):
        options = options_for(output, **wrong)
        images = options.pop("images", IMAGES)
        with pytest.raises((ValueError, FileNotFoundError)):
            train_concept(tiny_pipe(), images, **options)
        assert os.listdir(tmp_path) == []
    output.mkdir(parents=True)
    with pytest.raises(ValueError, match="`images`"):
        train_concept(tiny_pipe(), [], **options_for(output))
    assert output.is_dir()  # it was there before


def test_the_folder_is_found_writable_before_pictures_are_read(tmp_path):
    (tmp_path / "file").write_text("")
    options = options_for(tmp_path / "file" / "run")
    with pytest.raises(OSError, match="`output_dir` must be a folder that can be written to"):
        train_concept(tiny_pipe(), [], **options)  # which is wrong too


@pytest.mark.parametrize("name", ["images", "masks"])
def test_the_folder_of_pictures_is_not_the_runs(name, tmp_path):
    for number, image in enumerate(IMAGES):
        image.save(tmp_path / f"{number}.png")
    given = {"images": IMAGES} | {name: tmp_path}
    options = options_for(tmp_path / "." / "", **{"masks": None} | given)
    with pytest.raises(ValueError, match=f"`output_dir` must be another folder than `{name}`"):
        train_concept(tiny_pipe(), options.pop("images"), **options)


def test_times_are_those_of_the_clock_on_the_wall(tmp_path):
    file = lock(tmp_path)
    since = json.loads((tmp_path / LOCK).read_text())["since"]
    assert abs(time.mktime(time.strptime(since, "%Y-%m-%d %H:%M:%S")) - time.time()) < 10
    unlock(tmp_path, file)


def test_a_logging_folder_that_cannot_be_written_to_is_found_first(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    options = options_for(
        tmp_path / "run", report_to="tensorboard", logging_dir=str(tmp_path / "file" / "logs")
    )
    with pytest.raises(OSError, match=r"`logging_dir` must be a folder that can be written to, but .*file"):
        train_concept(tiny_pipe(), IMAGES, **options)
    assert os.listdir(tmp_path) == ["file"]
