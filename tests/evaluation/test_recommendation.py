"""The rule, on made-up figures."""

import pytest

from perfusion_pytorch.evaluation.recommendation import Point, least_prompt, recommend


def chosen(points, base, higher_is_weaker=True):
    point, is_enough = recommend([Point(*p) for p in points], base, higher_is_weaker=higher_is_weaker)
    return point.strength, is_enough


def test_the_most_alike_of_those_that_follow_prompts_is_recommended():
    points = [(0.3, 0.9, 0.25), (0.5, 0.8, 0.29), (0.7, 0.6, 0.30), (0.9, 0.5, 0.31)]
    assert chosen(points, base=0.30) == (0.5, True)
    assert chosen(points, base=0.26) == (0.3, True)
    assert chosen(points, base=0.32) == (0.9, True)


def test_just_95_percent_is_enough():
    points = [(0.3, 0.9, 0.95), (0.5, 0.8, 1.0)]
    assert chosen(points, base=1.0) == (0.3, True)
    assert chosen([(0.3, 0.9, 0.9499), (0.5, 0.8, 1.0)], base=1.0) == (0.5, True)


def test_of_equals_the_weakest_edit_is_recommended():
    points = [(0.3, 0.9, 1.0), (0.9, 0.9, 1.0), (0.5, 0.9, 1.0)]
    assert chosen(points, base=1.0) == (0.9, True)
    assert chosen(points, base=1.0, higher_is_weaker=False) == (0.3, True)


def test_where_none_follows_prompts_enough_the_nearest_is_recommended():
    points = [(0.3, 0.9, 0.5), (0.5, 0.8, 0.7), (0.7, 0.1, 0.6)]
    assert chosen(points, base=1.0) == (0.5, False)


def test_a_negative_figure_of_the_base_model_leaves_room_too():
    """Cosines of a CLIP that knows nothing are around 0."""
    assert least_prompt(-0.1) == pytest.approx(-0.105)
    assert chosen([(0.3, 0.9, -0.104), (0.5, 0.8, -0.05)], base=-0.1) == (0.3, True)
