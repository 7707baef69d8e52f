"""The plot: what is drawn where."""

import pytest
from PIL import Image

from perfusion_pytorch.evaluation.drawings import Curve, write_pareto

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """A function that writes a plot and returns its axes."""
    from matplotlib.figure import Figure

    figures = []
    own = Figure.__init__
    monkeypatch.setattr(
        Figure, "__init__", lambda self, **given: (own(self, **given), figures.append(self))[0]
    )

    def draw(*curves, **options):
        write_pareto(tmp_path / "plot.png", curves, x_label="followed", y_label="alike", **options)
        return figures[0].axes[0]

    return draw


def test_each_curve_is_a_line_with_a_large_mark(drawn, tmp_path):
    curve = Curve(
        "mine", [(0.2, 0.9), (0.3, 0.7)], ["β 0.3", "β 0.7"], 1, errors=[(0.01, 0.02, 0.03, 0.04)] * 2
    )
    axes = drawn(curve, Curve("other", [(0.25, 0.6)]))
    points = [line.get_xydata().tolist() for line in axes.lines]
    assert [[0.2, 0.9], [0.3, 0.7]] in points and [[0.3, 0.7]] in points and [[0.25, 0.6]] in points
    large = [line for line in axes.lines if line.get_markersize() > 5]
    assert [line.get_xydata().tolist() for line in large] == [[[0.3, 0.7]]]
    assert [text.get_text() for text in axes.texts] == ["β 0.3", "β 0.7"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mine", "other"]
    (across, upright) = (bar.get_segments() for bar in axes.collections)
    assert across[0].flatten().tolist() == pytest.approx([0.19, 0.9, 0.22, 0.9])
    assert upright[1].flatten().tolist() == pytest.approx([0.3, 0.67, 0.3, 0.74])
    assert Image.open(tmp_path / "plot.png").size == (1050, 750)


def test_a_default_is_a_large_mark_apart_from_the_points(drawn):
    axes = drawn(Curve("mine", [], default=(0.4, 0.5)))
    (large,) = [line for line in axes.lines if line.get_markersize() > 5]
    assert large.get_xydata().tolist() == [[0.4, 0.5]]


def test_points_at_one_place_share_a_label(drawn):
    axes = drawn(Curve("mine", [(1, 1), (1, 1), (2, 1)], ["β 0.3", "β 0.5", "β 0.7"]))
    assert [text.get_text() for text in axes.texts] == ["β 0.3, β 0.5", "β 0.7"]


def test_references_are_dashed_lines(drawn):
    axes = drawn(Curve("mine", [(1, 1)]), references={"floor": (2, 0.5), "ceiling": (None, 3)})
    dashed = [line.get_xydata().tolist() for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == [[[2, 0], [2, 1]], [[0, 0.5], [1, 0.5]], [[0, 3], [1, 3]]]
    assert [text.get_text() for text in axes.texts] == ["floor", "ceiling"]
