"""Ctrl-C while packages are imported: one line and exit code 130 in the command, an exception elsewhere."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import perfusion_pytorch
from perfusion_pytorch.early_interrupts import ends_at_ctrl_c, is_the_command

ROOT = Path(perfusion_pytorch.__file__).parents[1]
# Python's `sitecustomize` is imported before all else: Ctrl-C comes as soon as torch is looked for.
PRESSED = """
import os, signal, sys

class Press:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Press())
"""


def run(tmp_path, *command):
    (tmp_path / "sitecustomize.py").write_text(PRESSED)
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)


def test_the_command_ends_in_one_line(tmp_path):
    script = tmp_path / "perfusion"  # as pip writes it
    script.write_text("import sys\nfrom perfusion_pytorch.cli.main import main\nsys.exit(main())\n")
    for command in ([script], ["-m", "perfusion_pytorch"]):
        result = run(tmp_path, sys.executable, *command, "info", "f")
        assert (result.returncode, result.stdout, result.stderr) == (130, "", "perfusion: Interrupted.\n")


def test_a_users_own_program_gets_the_exception(tmp_path):
    program = "try:\n    import perfusion_pytorch\nexcept KeyboardInterrupt:\n    print('mine')"
    result = run(tmp_path, sys.executable, "-c", program)
    assert (result.returncode, result.stdout, result.stderr) == (0, "mine\n", "")


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["/usr/bin/perfusion"], [], True),
        (["C:/Scripts/perfusion.exe"], [], True),
        (["-m"], ["python", "-m", "perfusion_pytorch", "info"], True),
        (["/x/perfusion_pytorch/__main__.py"], ["python", "-m", "perfusion_pytorch"], True),
        (["-m"], ["python", "-m", "pytest"], False),
        (["train.py"], ["python", "train.py", "perfusion_pytorch"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_which_process_is_the_command(monkeypatch, argv, original, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert is_the_command() is expected


def test_afterwards_ctrl_c_is_as_it_was(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["perfusion"])
    before = signal.getsignal(signal.SIGINT)
    with ends_at_ctrl_c():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
