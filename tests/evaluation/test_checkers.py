"""Checkers of the user's own: what they return, and how they are named."""

import math

import numpy as np
import pytest

from perfusion_pytorch.evaluation.checkers import CheckedConcept, checked, checker_named

CAR = CheckedConcept("mine", "car", "<car-1>", 0.5)


def test_a_checker_gets_pictures_prompts_and_the_concept():
    def checker(pictures, prompts, concept):
        assert (pictures, prompts, concept) == (["p", "q"], ["a car", "one car"], CAR)
        return {"identity": np.array([True, False]), "bright": [np.float32(0.5), 1]}

    found = checked(checker, ("p", "q"), ("a car", "one car"), CAR)
    assert found == {"identity": [1.0, 0.0], "bright": [0.5, 1.0]}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "must return a mapping of names to a number for each picture, got NoneType"),
        ({}, "must return a mapping .* got dict"),
        ({"a": [1.0]}, r"a finite number for each of 2 pictures, got \[1.0\] as 'a'"),
        ({"a": [1.0, math.nan]}, "a finite number for each of 2 pictures"),
        ({"a": 0.5}, "got 0.5 as 'a'"),
        ({"a": ["x", "y"]}, "a finite number for each of 2 pictures"),
    ],
)
def test_what_is_not_a_number_for_each_picture_is_refused(result, message):
    with pytest.raises(ValueError, match=f"The checker <lambda> .*{message}"):
        checked(lambda pictures, prompts, concept: result, ["p", "q"], ["", ""], CAR)


def test_a_checker_is_named_by_its_module_or_its_file(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("VALUE = 3.0\n")
    path = tmp_path / "mine.py"
    path.write_text(
        "import beside\n\ndef three(pictures, prompts, concept):\n"
        "    return {'three': [beside.VALUE for _ in pictures]}\n\nNUMBER = 1\n"
    )
    monkeypatch.setattr("sys.path", ["/nowhere"])
    assert checked(checker_named(f"{path}:three"), ["p"], [""], CAR) == {"three": [3.0]}
    monkeypatch.setattr("sys.path", ["/nowhere"])
    monkeypatch.chdir(tmp_path)
    assert checked(checker_named("mine:three"), ["p"], [""], CAR) == {"three": [3.0]}
    for name, message in (
        ("mine", "must be named as module:function or file.py:function, got 'mine'"),
        ("mine:three()", "must be named as module:function"),
        ("mine:four", r"must name a function of mine, got 'four'. It has \['three'\]"),
        ("mine:NUMBER", "must name a function of mine, got 'NUMBER'"),
        ("not_there:three", "a module or a file that can be imported, got 'not_there'"),
        ("not_there.py:three", "got 'not_there.py': there is no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            checker_named(name)
