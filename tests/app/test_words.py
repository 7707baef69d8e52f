"""Coloured words: the more opaque the higher r is, and never markup."""

import re

from perfusion_pytorch.app.words import coloured_words, openness


def parts(html):
    """Return (text, how opaque, whether the gate is open) of each word."""
    found = re.findall(
        r'<span class="(word[^"]*)" style="background: rgba\([^)]*, ([\d.]+)\);[^>]*>(.*?)<small>', html
    )
    return [(text, float(opacity), "open" in kind) for kind, opacity, text in found]


def test_a_word_is_as_opaque_as_r_is_high():
    words = [("a", (0.1,)), ("<car-1>", (1.0,)), ("now", (-0.4,))]
    html = coloured_words("A <car-1> now", words, ["<car-1>"], [(0.5, 0.05)])
    assert parts(html) == [("A", 0.09, False), ("&lt;car-1&gt;", 0.85, True), ("now", 0.0, False)]


def test_of_two_concepts_the_nearer_one_gives_the_colour():
    html = coloured_words("x", [("x", (0.2, 0.9))], ["<a>", "<b>"], [(0.5, 0.05), (1.5, 0.05)])
    assert "rgba(13, 148, 136, 0.77)" in html and parts(html) == [("x", 0.77, False)]
    assert "r = 0.20 to &lt;a&gt;, its gate is 0% open; r = 0.90 to &lt;b&gt;" in html


def test_nothing_of_a_prompt_or_a_token_is_markup():
    evil = "<img/src=x onerror=alert(1)>"
    html = coloured_words(f"a {evil} \"'&", [("a", (0.0,)), (evil, (1.0,))], [evil], [(0.5, 0.1)])
    assert "<img" not in html and "&lt;img" in html and "&quot;&#x27;&amp;" in html


def test_pieces_of_a_word_stand_together_and_unknown_ones_are_shown():
    words = [("gra", (0.0,)), ("y", (0.0,)), ("Ã©", (0.0,))]
    text = re.sub(r"<small>.*?</small>|<[^>]*>", "", coloured_words("Gray é", words, ["<a>"], [(0.5, 0.1)]))
    assert text.startswith("Gray Ã©")


def test_a_gate_far_from_its_bias_does_not_overflow():
    assert openness(-1e6, 0.5, 0.01) == 0 and openness(1e6, 0.5, 0.01) == 1
