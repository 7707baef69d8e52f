"""Types of arguments, checked by beartype: numbers of numpy are taken as Python's, and lists as tuples."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast, get_args, get_origin

import beartype as checker

Function = TypeVar("Function", bound=Callable[..., Any])

CONF = checker.BeartypeConf(is_pep484_tower=True)  # an int will do for a float
# As the file names of the wrappers that beartype makes: a traceback shows no line of theirs, so that its last
# line is the user's.
FILE = "<@beartype(perfusion_pytorch)>"


def beartype(function: Function) -> Function:
    """Check the types of a function's arguments, after making plain what only looks different.

    numpy's numbers, which are what arithmetic on arrays returns, become Python's, also in lists, tuples and
    dictionaries: so they are taken, compared and written to files as those are. A list becomes a tuple
    where the function takes a tuple.

    Example:
        >>> import numpy
        >>> @beartype
        ... def half(number: float, shape: tuple[int, ...] = ()):
        ...     return number / 2, shape
        >>> half(numpy.float32(3), [1, numpy.int64(2)])
        (1.5, (1, 2))
    """
    checked = checker.beartype(conf=CONF)(function)
    parameters = inspect.signature(function).parameters
    names = [name for name, p in parameters.items() if p.kind is not p.VAR_POSITIONAL]
    takes_tuple = {name for name, parameter in parameters.items() if _takes_a_tuple(parameter.annotation)}

    def prepared(name: str, value: Any) -> Any:
        value = plain(value)
        return tuple(value) if type(value) is list and name in takes_tuple else value

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        given = [prepared(names[i] if i < len(names) else "", value) for i, value in enumerate(args)]
        return checked(*given, **{name: prepared(name, value) for name, value in options.items()})

    named: Any = call
    named.__code__ = named.__code__.replace(co_filename=FILE)
    return cast(Function, call)


def plain(value: Any) -> Any:
    """Return a number of numpy as one of Python, also within a list, a tuple or a dictionary; all else as is.

    Example:
        >>> import numpy
        >>> plain({"<a>": numpy.float32(0.5)}), plain(numpy.bool_(True))
        ({'<a>': 0.5}, True)
    """
    if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
        return value.item()
    if type(value) in (list, tuple):
        changed = [plain(one) for one in value]
        is_same = all(new is old for new, old in zip(changed, value, strict=True))
        return value if is_same else type(value)(changed)
    if type(value) is dict:
        return {key: plain(one) for key, one in value.items()}
    return value


def _takes_a_tuple(hint: Any) -> bool:
    return any((get_origin(one) or one) is tuple for one in (hint, *get_args(hint)))
