"""`perfusion similarities`: what the gate sees in prompts."""

import json
import re
from types import SimpleNamespace

from helpers.small_model import MODEL

from perfusion_pytorch.cli import similarities

WITH_MODEL = ["--pretrained_model_name_or_path", str(MODEL)]


def test_similarities_as_a_table_and_as_json(run, concepts):
    flags = [
        "similarities",
        *WITH_MODEL,
        "--device",
        "cpu",
        "--concept",
        concepts / "car.safetensors",
        concepts / "bear.safetensors",
    ]
    code, out, err = run(*flags)
    assert (code, err) == (0, "")
    prompts = [f"a photo of a {word}" for word in ("<car-1>", "car", "<bear-1>", "teddy bear")]
    assert [line for line in out.splitlines() if line[0] not in " r"] == prompts
    code, out, _ = run(*flags, "--json", "--prompt", "a <car-1> on a <bear-1>", "a house")
    first, second = json.loads(out)
    assert code == 0 and [entry["token"] for entry in first["tokens"]] == [
        "<|startoftext|>", "a", "<car-1>", "on", "a", "<bear-1>", "(end, padding)",
    ]  # fmt: skip
    assert first["tokens"][2]["r"]["<car-1>"] > 0.5 and set(second["tokens"][0]["r"]) == {
        "<car-1>",
        "<bear-1>",
    }


def test_odd_similarities_get_remarks(run, concepts):
    flags = [
        "similarities",
        *WITH_MODEL,
        "--device",
        "cpu",
        "--concept",
        concepts / "car.safetensors",
        "--prompt",
        "a <car-1> on red",
    ]
    _, out, _ = run(*flags, "--beta", "-9", "--json")
    said = json.loads(out)[0]["remarks"]
    expected = (
        r"red is at r = .*, above β -9: <car-1> shows there too. (A higher β keeps it out|No β separates)"
    )
    assert any(re.match(expected, line) for line in said)
    _, out, _ = run(*flags, "--beta", "<car-1>=9")
    assert (
        "  ! <car-1> is at r = " in out
        and "below β 9: the gate hides the concept" in out
        and "(9 of <car-1>)" in out
    )
    _, out, _ = run(*flags, "--beta", "-0.5", "--json")
    (own,) = (entry["r"]["<car-1>"] for entry in json.loads(out)[0]["tokens"] if entry["token"] == "<car-1>")
    assert any("far from 1" in line for line in json.loads(out)[0]["remarks"]) == (abs(own - 1) > 0.2)


def test_remarks_say_what_can_be_done():
    concept = SimpleNamespace(token="<car-1>", eval_gate=(0.7, 0.15))

    def remarks(**values):
        return similarities.remarks([(token, (r,)) for token, r in values.items()], [concept])

    assert remarks(a=0.1, **{"<car-1>": 0.95}, house=0.69) == []
    assert remarks(**{"<car-1>": 0.95}, house=0.8) == [
        "house is at r = 0.80, above β 0.7: <car-1> shows there too. A higher β keeps it out."
    ]
    (line,) = remarks(**{"<car-1>": 0.95}, house=0.96)
    assert line.endswith("No β separates the two: train longer, or with more captions.")
    assert [line[:24] for line in remarks(**{"<car-1>": 0.6}) + remarks(**{"<car-1>": 1.3})] == [
        "<car-1> is at r = 0.60, ",
        "<car-1> is at r = 1.30, ",
    ]
    assert remarks(car=0.8)[0].endswith("A higher β keeps it out.") and "No β" in remarks(car=1.0)[0]


def test_a_file_that_is_not_a_concept_is_found_before_the_model_is_loaded(run, tmp_path):
    for command in ("generate", "similarities"):
        flags = ["--pretrained_model_name_or_path", "./none", "--concept", tmp_path / "none", "--prompt", "a"]
        assert "There is no concept file" in run(command, *flags)[2]
