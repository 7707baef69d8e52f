"""The prompts that pictures are trained with: from templates and captions."""

import pytest

from perfusion_pytorch.training.templates import TEMPLATES, training_prompts


def test_prompts_of_pictures_with_and_without_captions():
    prompts, of_pictures = training_prompts(
        2, "<car-1>", "teddy bear", captions=[[], ["A Teddy  Bear by a bear", "a <car-1> here"]]
    )
    assert prompts == [template.format("<car-1>") for template in TEMPLATES] + [
        "A <car-1> by a bear",
        "a <car-1> here",
    ]
    assert of_pictures == [list(range(len(TEMPLATES))), [len(TEMPLATES), len(TEMPLATES) + 1]]
    assert training_prompts(1, "<a>", "car", captions=[["a car"]]) == (["a <a>"], [[0]])


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"templates": "a {}"},
            r"`templates` must be a list of texts, got one text, 'a {}'. Put it into a list: \['a {}'\]",
        ),
        ({"templates": []}, "`templates` must be one or more texts"),
        ({"templates": ["a {}", "a photo"]}, "one {} each.*\\['a photo'\\]"),
        (
            {"captions": [["a photo of a cartoon"]]},
            "must name the concept, as '<car-1>' or as 'car', got 'a photo of a cartoon'",
        ),
        ({"captions": []}, "captions for each of the 1 pictures"),
    ],
)
def test_prompts_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        training_prompts(1, "<car-1>", "car", **options)
