"""Ctrl-C ends a run between two steps."""

import os
import signal
import threading

import pytest
from tqdm import tqdm

from perfusion_pytorch.training import interruption as interruption_module
from perfusion_pytorch.training.interruption import noted_interruption


def test_the_first_ctrl_c_is_noted_and_the_second_raises(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), noted_interruption(tqdm(disable=True)) as interruption:
        assert not interruption.is_wanted
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.is_wanted and interruption.error is KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGINT)  # the same one, from the launcher
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(interruption_module, "SECOND_AFTER", 0.0)
        os.kill(os.getpid(), signal.SIGTERM)
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
