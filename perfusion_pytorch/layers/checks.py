"""What stands in the way of an edit: projections that cannot be wrapped, concepts that cannot be applied together."""

import warnings

from torch import nn

from perfusion_pytorch.layers.functional import overlap_condition

LARGE_OVERLAP = 1e4  # above this condition number, float32 loses half of its digits in the joint removal


def check_weight(name, proj):
    """Raise a ValueError that names the projection where its weight is not plain floating point numbers, as in quantised layers."""
    if type(proj.weight) is not nn.Parameter or not proj.weight.is_floating_point():
        raise ValueError(
            f"`{name}` must have a floating point nn.Parameter as its weight, got {type(proj.weight).__name__} of {proj.weight.dtype}. "
            "Quantised layers are not supported."
        )


def check_projection(name, proj):
    """Raise a ValueError that names the projection where a model's layer cannot be wrapped."""
    if type(proj) is not nn.Linear:
        raise ValueError(
            f"'{name}' must be a plain nn.Linear to be wrapped, got {type(proj).__name__}. Wrap a model only once."
        )
    check_weight(name, proj)


def warn_if_parallel(layer, *_):
    """Warn where a layer's concepts are so nearly parallel that applying them together is inexact."""
    seen = layer.initialized.any(dim=1)
    if seen.is_meta or seen.sum() < 2:
        return
    concept_input = layer._mean_of_slots(layer.concept_input, layer.initialized)
    condition = overlap_condition(concept_input[seen], layer.concept_dual[seen])
    if not condition < LARGE_OVERLAP:
        warnings.warn(
            f"The layer's concepts are nearly parallel (condition number above {LARGE_OVERLAP:.0e}), so applying them together is inexact. "
            "Apply them one at a time with `concept_id`, or train one of them with another superclass.",  # without figures: it shows once
            stacklevel=3,
        )
