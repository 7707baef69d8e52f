"""Means with bootstrap intervals."""

from itertools import product

import pytest

from perfusion_pytorch.evaluation.figures import Figure, bootstrap_interval, figure_of


def test_the_interval_is_that_of_all_ways_to_draw_again():
    """Of four values all 256 ways can be listed, so that the middle 95 % of their means are known."""
    values = [0.1, 0.4, 0.5, 0.9]
    means = sorted(sum(drawn) / 4 for drawn in product(values, repeat=4))
    low, high = bootstrap_interval(values, draws=200_000)
    assert low == pytest.approx(means[int(0.025 * 256)], abs=0.011)
    assert high == pytest.approx(means[int(0.975 * 256)], abs=0.011)


def test_a_figure_is_a_mean_with_its_interval():
    figure = figure_of([0.0, 1.0] * 32)
    assert figure.mean == 0.5 and figure.low == pytest.approx(0.375, abs=0.01)
    assert figure.high == pytest.approx(0.625, abs=0.01) and figure.margin == pytest.approx(0.125, abs=0.01)
    assert figure_of([0.0, 1.0] * 32) == figure  # the draws have a seed of their own
    assert figure_of([2.0]) == Figure(2.0, 2.0, 2.0)
