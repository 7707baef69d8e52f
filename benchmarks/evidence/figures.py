"""Figures of cells, averaged over seeds for each object, with intervals over objects."""

import json
from collections import defaultdict

import numpy as np

from perfusion_pytorch.evaluation.figures import bootstrap_interval


def read_cells(folder):
    """Return {name of the contender: records of its cells}.

    Raises:
        ValueError: a contender's cells were run with different settings.
    """
    groups, settings = defaultdict(list), {}
    for path in sorted(folder.glob("*-*.json")):
        record = json.loads(path.read_text()) | {"stem": path.stem}
        kept = {key: value for key, value in record["settings"].items() if key != "num_view_prompts"}
        if settings.setdefault(record["name"], kept) != kept:
            raise ValueError(
                f"The cells of one contender must be of one setting, but {path} is not as others of "
                f"{record['name']!r}. Move the older ones away."
            )
        groups[record["name"]].append(record)
    return dict(groups)


def by_object(records, figure):
    """Return {(superclass, object): mean over seeds} of a figure, where it is not None."""
    values = defaultdict(list)
    for record in records:
        value = figure(record)
        if value is not None:
            values[record["superclass"], record["object"]].append(value)
    return {key: float(np.mean(rows)) for key, rows in values.items()}


def of_view(view, name):
    """Return a function that reads a figure of a record: of a view, or with None of all of its pictures."""
    if view is None:
        return lambda record: record["figures"][name]
    return lambda record: record["views"].get(view, {}).get(name)


def mean_with_interval(values):
    """Return the mean over objects and its interval, as text."""
    low, high = bootstrap_interval(list(values))
    return f"{np.mean(list(values)):.2f} ({low:.2f} to {high:.2f})"


def difference(one, other):
    """Return the mean of one minus the other over the objects of both, its interval, and their number."""
    shared = sorted(one.keys() & other.keys())
    gaps = [one[key] - other[key] for key in shared]
    return float(np.mean(gaps)), bootstrap_interval(gaps), len(gaps)
