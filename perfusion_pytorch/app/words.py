"""A prompt's words coloured by r, what the gate sees, as HTML in which nothing of the prompt is markup."""

import math
from collections.abc import Sequence
from html import escape

HUES = ("79, 70, 229", "13, 148, 136", "217, 119, 6", "219, 39, 119")  # red, green and blue, for each concept
FULL = 0.85  # how opaque a word at r = 1 is


def coloured_words(
    prompt: str,
    words: Sequence[tuple[str, Sequence[float]]],
    tokens: Sequence[str],
    gates: Sequence[tuple[float, float]],
) -> str:
    """Return a prompt in which each word is as strongly coloured as r is high, and open gates are underlined.

    Args:
        prompt: as it was written.
        words: its tokens, each with r to each concept.
        tokens: the concepts' names.
        gates: β and τ of each concept.

    Example:
        >>> html = coloured_words("a <b>", [("a", [0.0]), ("<b>", [1.0])], ["<b>"], [(0.5, 0.1)])
        >>> "&lt;b&gt;<small>1.00</small>" in html
        True
    """
    pieces, at = [], 0
    for word, similarities in words:
        start = prompt.lower().find(word.lower(), at)
        if start < 0:  # a tokenizer writes some letters in another way
            shown, before = word, " "
        else:
            before, shown, at = prompt[at:start], prompt[start : start + len(word)], start + len(word)
        pieces.append(escape(before) + _word(shown, similarities, tokens, gates))
    keys = "".join(
        f'<span class="key"><i style="background: rgb({hue})"></i>r to {escape(token)}</span>'
        for token, hue in zip(tokens, HUES, strict=False)
    )
    return (
        f'<div class="words" aria-label="What the gate sees">{"".join(pieces)}{escape(prompt[at:])}</div>'
        f'<div class="keys">{keys}<span class="key"><u>underlined</u>: its gate is mostly open</span></div>'
    )


def openness(similarity: float, beta: float, temperature: float) -> float:
    """Return how far a gate is open: σ((r − β) / τ).

    Example:
        >>> openness(0.5, 0.5, 0.1)
        0.5
    """
    return 0.5 * (1 + math.tanh((similarity - beta) / (2 * temperature)))


def _word(
    text: str, similarities: Sequence[float], tokens: Sequence[str], gates: Sequence[tuple[float, float]]
) -> str:
    """Return a word in the colour of the concept that it is nearest to."""
    rows = list(zip(similarities, tokens, gates, HUES, strict=False))
    nearest, _, _, hue = max(rows)
    opened = [openness(r, *gate) for r, _, gate, _ in rows]
    told = "; ".join(
        f"r = {r:.2f} to {token}, its gate is {share:.0%} open"
        for (r, token, _, _), share in zip(rows, opened, strict=True)
    )
    strength = FULL * min(1.0, max(0.0, nearest))
    kinds = "word open" if max(opened) > 0.5 else "word"
    ink = " color: white;" if strength > 0.5 else ""
    style = f"background: rgba({hue}, {strength:.2f});{ink}"
    return (
        f'<span class="{kinds}" style="{style}" title="{escape(told)}">{escape(text)}'
        f"<small>{nearest:.2f}</small></span>"
    )
