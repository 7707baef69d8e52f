"""The paper's claims, each as a difference between two ways, which were measured on the same objects."""

from typing import NamedTuple

from figures import by_object, difference, of_view

OURS = "perfusion"


class Way(NamedTuple):
    """A contender's pictures: all of them, or those of a view."""

    name: str
    view: str | None = None


class Claim(NamedTuple):
    """What is said: that a figure of `one` is higher (or with `sign` -1 lower) than that of `other`."""

    text: str
    figure: str
    one: Way
    other: Way
    sign: int = 1


DEFAULT, FREE, GLOBAL = Way(OURS, "default"), Way(OURS, "keys locked by 0"), Way(OURS, "global lock")
LOW, HIGH, SHUT, BLUNT = (Way(OURS, view) for view in ("β 0.25", "β 0.9", "β 1.5", "τ 0.15"))
TRAINED_LOW, TRAINED_HIGH = (Way(f"{OURS}, training β {beta}") for beta in ("0.25", "0.75"))
CLAIMS = (
    Claim("locked keys follow the prompt better than the embedding's own", "followed", DEFAULT, FREE),
    Claim("locked keys cost likeness", "identity", DEFAULT, FREE, -1),
    Claim("a global lock follows the prompt better than a local one", "followed", GLOBAL, DEFAULT),
    Claim("a global lock costs likeness", "identity", GLOBAL, DEFAULT, -1),
    Claim("a low β is more like the object than a high one", "identity", LOW, HIGH),
    Claim("a high β follows the prompt better than a low one", "followed", HIGH, LOW),
    Claim("a blunter gate at inference than in training helps", "both", BLUNT, DEFAULT),
    Claim("a higher β in training helps", "both", TRAINED_HIGH, TRAINED_LOW),
    Claim("a blunter gate in training helps", "both", Way(f"{OURS}, training τ 0.15"), Way(OURS)),
    Claim("masks help", "both", Way(OURS), Way(f"{OURS}, no masks")),
    Claim("five pictures are better than one", "identity", Way(OURS), Way(f"{OURS}, one picture")),
    Claim("the edit adds to its embedding alone (the gate shut)", "both", DEFAULT, SHUT),
)


def verdict(low, high, sign):
    """Say whether an interval bears a claim out."""
    low, high = (low, high) if sign > 0 else (-high, -low)
    return "holds" if low > 0 else "the opposite holds" if high < 0 else "not shown"


def claims_table(groups):
    """Return a Markdown table of the claims whose cells are there."""
    lines = ["| claim | figure | difference | objects | |", "| --- | --- | --- | --- | --- |"]
    for claim in CLAIMS:
        one, other = (
            by_object(groups.get(way.name, ()), of_view(way.view, claim.figure))
            for way in (claim.one, claim.other)
        )
        if one.keys() & other.keys():
            mean, (low, high), count = difference(one, other)
            gap = f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"
            lines.append(
                f"| {claim.text} | {claim.figure} | {gap} | {count} | {verdict(low, high, claim.sign)} |"
            )
    return "\n".join(lines)
