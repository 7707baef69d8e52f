"""Cells of the GPU benchmark: budget, errors, turns, and the file that is always up to date."""

import json
import time

import pytest
from gpu.cells import LATE, Report, interleaved, medians, one_line, ratio


@pytest.fixture
def report(tmp_path, capsys):
    return Report(tmp_path / "result.json", {"device": "a card"}, minutes=1, started=time.perf_counter())


def read(report):
    return json.loads(report.path.read_text())


def test_a_cell_is_written_as_soon_as_it_ends(report):
    report.cell("one", 1, lambda deadline: {"found": 1})
    assert read(report)["cells"]["one"]["found"] == 1 and read(report)["device"] == "a card"

    def second(deadline):
        assert list(read(report)["cells"]) == ["one"]
        return {"found": 2}

    report.cell("two", 1, second)
    assert read(report)["cells"]["two"]["found"] == 2


def test_a_cell_that_fails_is_one_line_and_the_next_one_runs(report):
    def fails(deadline):
        raise RuntimeError("CUDA out of memory.\nA long explanation")

    report.cell("one", 1, fails)
    report.cell("two", 1, lambda deadline: {"found": 2})
    cells = read(report)["cells"]
    assert cells["one"]["error"] == "RuntimeError: CUDA out of memory."
    assert cells["two"]["found"] == 2


def test_a_cell_that_does_not_fit_is_not_started(report):
    report.cell("long", 61, lambda deadline: pytest.fail("was started"))
    assert read(report)["cells"]["long"] == {"skipped": "it needs about 61 s, and 60 s were left"}


def test_a_cell_is_told_when_its_seconds_are_over(report):
    left = []
    report.cell("one", 5, lambda deadline: left.append(deadline - time.perf_counter()) or {})
    assert 0 < left[0] <= 5


def test_runs_take_turns_after_one_warm_up_each():
    order = []
    runs = {name: lambda name=name: order.append(name) or {"s": 1.0} for name in "ab"}
    warm_up = {name: lambda name=name: order.append(name.upper()) for name in "ab"}
    found = interleaved(runs, float("inf"), warm_up=warm_up, least=1, most=2)
    assert "".join(order) == "ABabab"
    assert found.rounds == {"a": [{"s": 1.0}] * 2, "b": [{"s": 1.0}] * 2} and not found.errors


def test_after_the_deadline_only_the_least_rounds_are_made():
    found = interleaved({"a": lambda: {"s": 1.0}}, 0.0, least=2, most=9)
    assert len(found.rounds["a"]) == 2


def test_a_run_that_fails_leaves_the_others():
    calls = []

    def fails_later():
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")
        return {"s": 1.0}

    runs = {"a": lambda: {"s": 1.0}, "b": fails_later, "c": lambda: 1 / 0}
    found = interleaved(runs, float("inf"), least=1, most=4)
    assert found.rounds == {"a": [{"s": 1.0}] * 4}
    assert found.errors == {"b": "MemoryError: no room", "c": "ZeroDivisionError: division by zero"}


def test_what_is_slow_to_start_is_left_out_after_the_deadline():
    found = interleaved({"a": lambda: {"s": 1.0}}, 0.0, least=1, most=1, slow_start=True)
    assert found.rounds == {} and found.errors == {"a": LATE}


def test_a_ratio_is_the_median_over_rounds_of_the_named_parts():
    runs = [{"a": 2.0, "b": 9.0}, {"a": 3.0, "b": 9.0}, {"a": 40.0, "b": 9.0}]
    base = [{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"a": 10.0, "b": 1.0}]
    assert ratio(runs, base, ["a"]) == 3.0
    assert ratio(runs, base, ["a", "b"]) == 11 / 2  # of 11 / 2, 12 / 2 and 49 / 11
    assert ratio(runs, [], ["a"]) is None
    assert medians(runs) == {"a": 3.0, "b": 9.0} and medians([]) == {}


def test_an_error_without_a_message_is_its_kind():
    assert one_line(ValueError()) == "ValueError: "
    assert len(one_line(ValueError("x" * 999))) == 200
