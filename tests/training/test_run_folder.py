"""The folder of a run is looked at before training, and Ctrl-C ends a run between steps."""

import errno
import os
import shutil
import signal
import tempfile
import threading
from collections import namedtuple
from contextlib import contextmanager

import pytest
from tqdm import tqdm

from perfusion_pytorch.training import interruption as run_folder
from perfusion_pytorch.training.interruption import check_output_dir, noted_interruption


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

    monkeypatch.setattr(run_folder, "write_atomically", full)
    with pytest.raises(OSError, match=r"cannot: .*No space left"):
        check_output_dir(tmp_path, 1)


def test_the_first_ctrl_c_is_noted_and_the_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), noted_interruption(tqdm(disable=True)) as interruption:
        assert not interruption.is_wanted
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.is_wanted
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_are_left_alone():
    handlers = []

    def work():
        with noted_interruption(tqdm(disable=True)) as interruption:
            handlers.append((signal.getsignal(signal.SIGINT), interruption.is_wanted))

    thread = threading.Thread(target=work)
    thread.start(), thread.join()
    assert handlers == [(signal.getsignal(signal.SIGINT), False)]
