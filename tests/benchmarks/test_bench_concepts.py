"""The benchmarks of many concepts and of serving run as a whole, small."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a benchmark's main with arguments, and return what it wrote."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name, *arguments):
        module = pytest.importorskip(name)
        output = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", [name, *arguments, "--output", str(output)])
        module.main()
        return json.loads(output.read_text(encoding="utf-8"))

    return run


def test_many_concepts(run):
    found = run("bench_concepts", "--count", "5", "--rounds", "1", "--num_threads", "1")
    assert found["concepts"] == 5 and found["a picture with all loaded over one with one"] > 0
    assert 0 < found["bytes in memory"] < 3 * found["bytes of the files"]
    assert all(value > 0 for kind in ("loading", "deleting") for value in found[f"{kind} one"].values())


@pytest.mark.slow
def test_serving_mixes_nothing_up(run):
    """Also by this measure: a picture is compared with the ones of all users."""
    found = run("bench_serve", "--users", "3", "--requests", "9", "--max_batch", "2")
    for mode in ("batches of 2", "one prompt a batch"):
        assert found[mode]["pictures that are not the user's own"] == 0
        assert found[mode]["pictures a second"] > 0
    assert found["least distance of two users' pictures, of 255"] > 2
