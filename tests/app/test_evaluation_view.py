"""The table that the page shows of an evaluation's figures."""

import re

from perfusion_pytorch.app.evaluation_view import only, recommendations, table


def figure(mean, margin=0.0):
    return {"mean": mean, "low": mean - margin, "high": mean + margin}


def rows(*pairs):
    return [
        {"strength": strength, "figures": {"identity": figure(mean, 0.1), "plain change": figure(2.0)}}
        for strength, mean in pairs
    ]


def found(name="car"):
    mine = {"name": name, "knob": "beta", "recommended": 0.9, "reason": "it is best.", "kind": "Perfusion"}
    lora = {"name": "lora", "knob": "scale", "recommended": None, "reason": "none.", "kind": "LoRA"}
    inversion = {"name": "ti", "knob": None, "recommended": None, "reason": "-", "kind": "textual inversion"}
    return {
        "files": [
            {**mine, "strengths": rows((0.3, 0.5), (0.9, 0.75))},
            {**lora, "strengths": rows((1.0, 0.25))},
            {**inversion, "strengths": rows((None, 0.125))},
        ],
        "base_model": {"identity": figure(0.0)},
        "training_pictures": {"identity": figure(1.0)},
        "meanings": {"identity": 'so "like" it'},
        "superclass": "car",
        "num_prompts": 3,
        "num_images_per_prompt": 1,
        "num_training_pictures": 5,
        "summary": {},
        "recommended": None,
    }


def cells(html):
    """Return (label, texts of the cells, whether it is marked) of each row of the body."""
    return [
        (label, [re.sub("<.*?>", "", cell) for cell in re.findall("<td>(.*?)</td>", row)], "chosen" in kind)
        for kind, label, row in re.findall(
            r"<tr([^>]*)><th>(.*?)</th>(<td>.*?)</tr>", html.partition("<tbody>")[2]
        )
    ]


def test_each_strength_is_a_row_and_the_recommended_one_is_marked():
    assert cells(table(found())) == [
        ("training pictures", ["1.000 ± 0.000", "–"], False),
        ("car β 0.3", ["0.500 ± 0.100", "2.00"], False),
        ("car β 0.9", ["0.750 ± 0.100", "2.00"], True),
        ("lora scale 1", ["0.250 ± 0.100", "2.00"], False),
        ("ti", ["0.125 ± 0.100", "2.00"], False),
        ("base model", ["0.000 ± 0.000", "–"], False),
    ]


def test_nothing_of_a_file_is_markup():
    html = table(found('<img src="x">'))
    assert "<img" not in html and "&lt;img src=&quot;x&quot;&gt;: β 0.9 is recommended" in html
    assert 'title="so &quot;like&quot; it"' in html


def test_what_has_strengths_has_a_sentence():
    assert recommendations(found()) == ["car: β 0.9 is recommended: it is best.", "lora: none."]


def test_the_figures_beside_a_file_are_its_own():
    alone = only(found(), 0)
    assert (alone["recommended"], [file["name"] for file in alone["files"]]) == (0.9, ["car"])
    assert alone["summary"]["identity"]["mean"] == 0.75
