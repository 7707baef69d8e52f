"""The prompts of an evaluation: built-in, from a file, or given."""

import pytest

from perfusion_pytorch.evaluation.prompts import (
    LIVING_PROMPTS,
    OBJECT_PROMPTS,
    UNRELATED_PROMPTS,
    prompts_for,
)


@pytest.mark.parametrize(("name", "texts"), [("objects", OBJECT_PROMPTS), ("living", LIVING_PROMPTS)])
def test_built_in_prompts_have_one_place_for_the_thing(name, texts):
    assert prompts_for(name, "bear").templates == texts
    assert len(set(texts)) == 16 and all(text.count("{}") == 1 for text in texts)
    assert not any("{}" in text for text in UNRELATED_PROMPTS)


def test_built_in_unrelated_prompts_do_not_name_the_superclass():
    unrelated = prompts_for("objects", "flowers Vase").unrelated
    assert set(UNRELATED_PROMPTS) - set(unrelated) == {"a vase with yellow flowers"}


def test_a_file_holds_a_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\na {} on red\n\n  one {}  \na house\n")
    prompts = prompts_for(path, "car")
    assert prompts.templates == ("a {} on red", "one {}") and prompts.unrelated == ("a house",)
    path.write_text("a {}")
    assert prompts_for(str(path), "car").unrelated == UNRELATED_PROMPTS


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a {} and a {}"], r"each prompt once, with one \{\} at most, got 'a \{\} and a \{\}'"),
        (["a {}", "a {}"], r"each prompt once, with one \{\} at most, got 'a \{\}'"),
        (["a car"], r"must hold prompts with a \{\} in the place of the thing, .* none of its 1 has one"),
        ([], "none of its 0 has one"),
    ],
)
def test_wrong_prompts_are_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        prompts_for(texts, "car")


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"must be 'objects' or 'living', or a text file .*got 'object'"
    ):
        prompts_for("object", "car")
    (tmp_path / "bad").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match="bad must be text in UTF-8"):
        prompts_for(tmp_path / "bad", "car")
