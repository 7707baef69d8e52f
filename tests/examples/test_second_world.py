"""The second small world, in a process of its own: its modules have the names of the first one's."""

import subprocess
import sys
from pathlib import Path

import pytest

WORLD = Path(__file__).parents[2] / "examples" / "world"


def run(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=WORLD, capture_output=True, text=True, timeout=300
    )


def test_the_worlds_examples_run():
    result = run("-m", "doctest", "world.py")
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.slow
def test_the_worlds_own_tests_pass():
    folder = Path(__file__).parent / "second_world"
    result = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(folder))
    assert result.returncode == 0, result.stdout[-4000:]
