"""Reads this package's docstrings as griffe's parser of Google-style docstrings expects them."""

import re

import griffe

EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
# A line such as "    a, b: text" with the deeper lines below it.
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+):( .+)?\n((?:\1 +.*(?:\n|$))*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rename "Example:", which griffe does not know, and describe each of several parameters on its own."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is not None:
            text = EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = SEVERAL.sub(_one_each, text)


def _one_each(found: re.Match[str]) -> str:
    indent, names, first, others = found.groups()
    text = " ".join(f"{first or ''} {others}".split())
    return "".join(f"{indent}{name}: {text}\n" for name in names.split(", "))
