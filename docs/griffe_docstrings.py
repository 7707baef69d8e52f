"""Reads this package's docstrings as griffe's parser of Google-style docstrings expects them."""

import importlib
import inspect
import re

import griffe

EXAMPLE = re.compile(r"^( *)Example:$", re.MULTILINE)
# A line such as "    a, b: text" with the deeper lines below it.
SEVERAL = re.compile(r"^( +)(\w+(?:, \w+)+):( .+)?\n((?:\1 +.*(?:\n|$))*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rename "Example:", which griffe does not know, and describe each of several parameters on its own.

    Defaults that are names get the value of the name.
    """

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrite an object's docstring."""
        if obj.docstring is not None:
            text = EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
            obj.docstring.value = SEVERAL.sub(_one_each, text)
        if isinstance(obj, griffe.Function):
            named = [
                p for p in obj.parameters if isinstance(p.default, griffe.ExprAttribute | griffe.ExprName)
            ]
            for parameter in named:
                parameter.default = repr(_signature(obj).parameters[parameter.name].default)


def _signature(function: griffe.Function) -> inspect.Signature:
    target = importlib.import_module(function.module.path)
    for name in function.path.removeprefix(f"{function.module.path}.").split("."):
        target = getattr(target, name)
    return inspect.signature(target)


def _one_each(found: re.Match[str]) -> str:
    indent, names, first, others = found.groups()
    text = " ".join(f"{first or ''} {others}".split())
    return "".join(f"{indent}{name}: {text}\n" for name in names.split(", "))
