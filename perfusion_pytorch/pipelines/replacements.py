"""Methods that are replaced on one object for a time, and put back."""

from collections.abc import Callable
from typing import Any

ATTRIBUTE = "_perfusion_replacements"  # of the object


class Replacements:
    """The methods replaced on one object, and what it had in their place.

    The record lives on the object itself, so that a deep copy of a module takes its own along.

    Args:
        owner: the object.

    Example:
        >>> class Greeter:
        ...     def greet(self):
        ...         return "hello"
        >>> greeter = Greeter()
        >>> Replacements.on(greeter).put("greet", lambda: "good day")
        >>> greeter.greet(), "greet" in Replacements.on(greeter)
        ('good day', True)
        >>> Replacements.on(greeter).take_back()
        >>> greeter.greet(), vars(greeter)
        ('hello', {})
    """

    def __init__(self, owner: object) -> None:
        self.owner = owner
        # By name: the attribute that the object itself had, in a tuple, or an empty one where only its class
        # had it.
        self.before: dict[str, tuple[Any, ...]] = {}

    @classmethod
    def on(cls, owner: object) -> "Replacements":
        """Return the record of an object, a new one where nothing is replaced yet."""
        found: Replacements | None = vars(owner).get(ATTRIBUTE)
        return found or cls(owner)

    def __contains__(self, name: str) -> bool:
        return name in self.before

    def put(self, name: str, method: Callable[..., Any]) -> None:
        """Replace a method, on this object alone; what was there before the first replacement is kept."""
        attributes = vars(self.owner)
        attributes[ATTRIBUTE] = self
        self.before.setdefault(name, (attributes[name],) if name in attributes else ())
        setattr(self.owner, name, method)

    def take_back(self) -> None:
        """Put back what was there before."""
        attributes = vars(self.owner)
        for name, kept in self.before.items():
            attributes.pop(name, None)
            attributes.update((name, method) for method in kept)
        self.before.clear()
        attributes.pop(ATTRIBUTE, None)
