"""Who is compared: the parts of the evidence, and the settings that were searched for each method."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

SETTINGS = Path(__file__).with_name("settings.json")  # what `search.py` found on development objects


@dataclass(frozen=True)
class Contender:
    """A method as it takes part.

    Attributes:
        name: what tables call it.
        method: of `methods.METHODS`.
        options: its settings that are not the function's defaults.
        masks: whether the loss is weighted by masks.
        num_pictures: how many pictures it learns from.
        equal: "steps": as many as every other; "seconds": as many as fit into the time that Perfusion takes.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    masks: bool = True
    num_pictures: int = 5
    equal: str = "steps"

    def facts(self) -> dict[str, Any]:
        """Return all that what it learns depends on, as JSON can hold it."""
        return {name: value for name, value in asdict(self).items() if name != "name"}


def contender(method: str, **changes: Any) -> Contender:
    """Return a method with the settings that the search found for it."""
    found = json.loads(SETTINGS.read_text()) if SETTINGS.exists() else {}
    options = {**found.get(method, {}), **changes.pop("options", {})}
    return Contender(changes.pop("name", method), method, options, **changes)


# Global locking, and other gates and locks at inference, are views of what "perfusion" learned.
MAIN = (
    "perfusion",
    "perfusion, as the paper",
    "textual inversion",
    "LoRA, rank 1",
    "LoRA, rank 4",
    "LoRA, all projections",
    "Custom Diffusion",
)
UNMASKED = ("perfusion", "textual inversion", "LoRA, rank 1", "Custom Diffusion")


def parts() -> dict[str, list[Contender]]:
    """Return the contenders of each part of the evidence, in the order in which they are run."""
    main = [contender(method) for method in MAIN]
    ours = {"method": "perfusion"}
    return {
        "main": main,
        "equal time": [replace(c, name=f"{c.name}, equal time", equal="seconds") for c in main[1:]],
        "no masks": [contender(m, name=f"{m}, no masks", masks=False) for m in UNMASKED],
        "claims": [
            contender(**ours, name="perfusion, one picture", num_pictures=1),
            contender(**ours, name="perfusion, training β 0.25", options={"train_beta": 0.25}),
            contender(**ours, name="perfusion, training β 0.75", options={"train_beta": 0.75}),
            contender(**ours, name="perfusion, training τ 0.15", options={"train_temperature": 0.15}),
        ],
    }
