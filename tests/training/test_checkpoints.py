"""The folder of a run is checked before training; its checkpoints are written atomically."""

import errno
import json
import os
import shutil
import tempfile
from collections import namedtuple
from contextlib import contextmanager

import pytest
import torch

from perfusion_pytorch.training import checkpoints
from perfusion_pytorch.training.checkpoints import (
    check_output_dir,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

TENSORS = {
    "a": torch.tensor([1.0, -0.0, 3e-42]),
    "b": torch.tensor([True]),
    "c": torch.arange(6).view(2, 3).T,
}


def names(folder):
    return [path.name for path in checkpoints_in(folder)]


def test_what_was_saved_is_loaded(tmp_path):
    folder = save_checkpoint(tmp_path / "run", 7, TENSORS, {"settings": {"seed": 1}})
    tensors, about = load_checkpoint(folder)
    assert folder == tmp_path / "run" / "checkpoint-7" and sorted(os.listdir(folder)) == [
        "state.json",
        "state.safetensors",
    ]
    assert (about["step"], about["settings"]) == (7, {"seed": 1}) and tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype
        for name, tensor in TENSORS.items()
    )
    save_checkpoint(tmp_path / "run", 7, {"a": torch.zeros(1)}, {})
    assert load_checkpoint(folder)[0].keys() == {"a"} and os.listdir(tmp_path / "run") == ["checkpoint-7"]


def test_the_oldest_are_removed(tmp_path):
    for step in (2, 10, 4, 6):
        save_checkpoint(tmp_path, step, TENSORS, {}, limit=3)
    assert names(tmp_path) == [
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-10",
    ]  # by their numbers, not their names
    save_checkpoint(tmp_path, 12, TENSORS, {}, limit=1)
    assert names(tmp_path) == ["checkpoint-12"] == os.listdir(tmp_path)


@pytest.mark.parametrize("call", ["write_atomically", "_sync", "os.replace"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_failure_while_writing_keeps_earlier_checkpoints(call, number, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 2, TENSORS, {})
    owner, name = (os, "replace") if call == "os.replace" else (checkpoints, call)
    original, calls = getattr(owner, name), []

    def fail(*args):
        calls.append(args)
        if len(calls) > number:
            raise OSError("no space left on device")
        return original(*args)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tmp_path, 4, TENSORS, {}, limit=1)
    monkeypatch.undo()
    is_whole = (call, number) == ("_sync", 1)  # all was in its place already
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"][: 1 + is_whole]
    load_checkpoint(find_checkpoint(tmp_path, "latest"))


def test_leftovers_of_a_killed_run_are_not_checkpoints_and_are_removed_by_the_next(tmp_path):
    save_checkpoint(tmp_path, 2, TENSORS, {})
    (tmp_path / ".checkpoint-4.partial").mkdir()
    (tmp_path / ".checkpoint-4.partial" / "state.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoint-last").mkdir(), (tmp_path / "checkpoint-9").write_text("a file")
    assert names(tmp_path) == ["checkpoint-2"] and find_checkpoint(tmp_path, "latest").name == "checkpoint-2"
    save_checkpoint(tmp_path, 6, TENSORS, {})
    assert not (tmp_path / ".checkpoint-4.partial").exists() and names(tmp_path) == [
        "checkpoint-2",
        "checkpoint-6",
    ]


@pytest.mark.parametrize("error", [OSError("no space left"), SystemExit("killed")])
def test_a_checkpoint_that_is_replaced_exists_whatever_happens(error, tmp_path, monkeypatch):
    folder, replace, moved = save_checkpoint(tmp_path, 2, TENSORS, {}), os.replace, []

    def fail(source, target):
        if str(source).endswith(".partial") and str(target).endswith("checkpoint-2"):
            raise error
        moved.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    if isinstance(error, SystemExit):  # after a kill nothing more is done: not even what `finally` says
        monkeypatch.setattr(checkpoints, "_put_back", lambda output_dir: None)
        monkeypatch.setattr(checkpoints, "_remove", lambda folder: None)
    with pytest.raises(type(error)):
        save_checkpoint(tmp_path, 2, {"a": torch.zeros(1)}, {})
    monkeypatch.undo()
    assert any(str(path).endswith(".checkpoint-2.replaced") for path in moved)
    assert folder.exists() == isinstance(error, OSError)
    assert (
        find_checkpoint(tmp_path, "latest") == folder and load_checkpoint(folder)[0].keys() == TENSORS.keys()
    )
    save_checkpoint(tmp_path, 2, {"a": torch.zeros(1)}, {})
    assert load_checkpoint(folder)[0].keys() == {"a"} and os.listdir(tmp_path) == ["checkpoint-2"]


def change(path, **facts):
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (
            lambda f: (f / "state.safetensors").unlink(),
            FileNotFoundError,
            r"but \['state.safetensors'\] are missing",
        ),
        (
            lambda f: (f / "state.safetensors").write_bytes(b"half"),
            ValueError,
            "does not match its content. Resume from an earlier one",
        ),
        (lambda f: (f / "state.json").write_text("{"), ValueError, "cannot be used as a checkpoint"),
        (lambda f: (f / "state.json").write_text("[]"), ValueError, "cannot be used as a checkpoint"),
        (
            lambda f: change(f / "state.json", format_version=2),
            ValueError,
            "`format_version` must be 1, got 2",
        ),
        (lambda f: change(f / "state.json", sha256="0"), ValueError, "its checksum does not match"),
        (
            lambda f: change(f / "state.json", step=9),
            ValueError,
            "its checksum does not match its content",
        ),
    ],
)
def test_damaged_ones_are_refused(damage, error, message, tmp_path):
    folder = save_checkpoint(tmp_path, 2, TENSORS, {})
    damage(folder)
    with pytest.raises(error, match=message):
        load_checkpoint(folder)


def test_which_checkpoint_a_run_resumes_from(tmp_path):
    run = tmp_path / "run"
    assert find_checkpoint(run, None) is None
    with pytest.warns(
        UserWarning, match="There is no checkpoint in .*run to resume from; training starts anew"
    ):
        assert find_checkpoint(run, "latest") is None
    folders = [save_checkpoint(run, step, TENSORS, {}) for step in (2, 10, 9)]
    assert find_checkpoint(run, "latest") == folders[1]
    assert find_checkpoint(run, "checkpoint-2") == folders[0] == find_checkpoint(tmp_path, folders[0])
    names = r"\['checkpoint-2', 'checkpoint-9', 'checkpoint-10'\]"
    with pytest.raises(ValueError, match=f"no checkpoints of another run, but .* has {names}"):
        find_checkpoint(run, None)
    with pytest.raises(
        FileNotFoundError, match="must be a checkpoint's folder or 'latest', got 'checkpoint-3'"
    ):
        find_checkpoint(run, "checkpoint-3")


def test_a_folder_that_can_be_written_to_is_made_and_left_empty(tmp_path):
    assert check_output_dir(tmp_path / "a" / "b", 1) == tmp_path / "a" / "b"
    assert not list((tmp_path / "a" / "b").iterdir())


def test_folders_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(
            OSError, match=r"`output_dir` must be a folder that can be written to, but .* cannot"
        ):
            check_output_dir(path, 1)


@contextmanager
def not_as_root():
    """Root may write anywhere, so be nobody meanwhile."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_read_only_folder():
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # others than root cannot even look into `tmp_path` of root's
        os.chmod(folder, 0o777)
        with not_as_root():
            check_output_dir(folder, 1)
        os.chmod(folder, 0o555)
        with (
            not_as_root(),
            pytest.raises(OSError, match=r"must be a folder that can be written to.*Permission denied"),
        ):
            check_output_dir(folder, 1)


def test_a_full_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 1, 99))
    with pytest.raises(OSError, match="with at least 1,000 bytes free, got 99"):
        check_output_dir(tmp_path, 1000)

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_atomically", full)
    with pytest.raises(OSError, match=r"cannot: .*No space left"):
        check_output_dir(tmp_path, 1)
