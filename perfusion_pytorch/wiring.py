"""Find the cross-attention projections of a model, wrap them and unwrap them."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, cast

from beartype import beartype
from torch import Tensor, nn

from perfusion_pytorch.layers.checks import check_projection
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule
from perfusion_pytorch.layers.wrapped import WrappedProjection
from perfusion_pytorch.module_hooks import take_over_hooks_, uncompiled

Wrapped = TypeVar("Wrapped", bound=WrappedProjection)


def _bypass(module: nn.Module, text_width: int) -> str | None:
    """Return what an attention's processor uses in the place of the wrapped projections, or None.

    Args:
        module: the attention.
        text_width: the width of its text encodings.
    """
    processor = getattr(module, "processor", None)
    name = type(processor).__name__
    if name.startswith("Fused"):  # `fused_projections` stays True after unfusing
        return "fused projections, which bypass the edit. Call `unfuse_qkv_projections()` first."
    if isinstance(processor, nn.Module):
        own = [
            key
            for key, layer in processor.named_modules()
            if isinstance(layer, nn.Linear) and layer.in_features == text_width and not _is_beside(key)
        ]
        if own:
            return (
                f"the processor {name} with projections {own} of its own, which bypass the edit. "
                "Set another processor with `set_attn_processor()` first."
            )
    return None


def _is_beside(name: str) -> bool:
    """Return whether a processor's layer makes queries, outputs, or an IP-Adapter's keys and values.

    Those are used beside the text's keys and values, and not in their place.
    """
    return name.startswith(("to_q", "to_out")) or name.partition(".")[0].endswith("_ip")


def cross_attention_projections(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """Yield (name, is_key) of the text key and value projections of a diffusers model.

    Attentions with `add_k_proj` take the text there, and their `to_k` is self-attention (Kandinsky,
    DeepFloyd). All others are marked by `is_cross_attention`.

    Raises:
        ValueError: an attention has fused projections, or a processor with projections of its own.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if "_orig_mod" in module._modules:  # the compiled module comes next, by its own name
            continue
        if getattr(module, "add_k_proj", None) is not None:
            attributes = ("add_k_proj", "add_v_proj")
        elif getattr(module, "is_cross_attention", False) and hasattr(module, "to_k"):
            attributes = ("to_k", "to_v")
        else:
            continue
        projection: Any = module.get_submodule(attributes[0])
        check_not_bypassed(name, module, getattr(projection, "in_features", 0))
        for attribute, is_key in zip(attributes, (True, False), strict=True):
            yield f"{name}.{attribute}".removeprefix("."), is_key


def check_not_bypassed(name: str, attention: nn.Module, text_width: int) -> None:
    """Raise a ValueError where an attention does not use its own projections of text of this width."""
    bypass = _bypass(attention, text_width)
    if bypass is not None:
        raise ValueError(f"'{plain_name(name)}' has {bypass}")


def plain_name(name: str) -> str:
    """Return a module's name in the model as it was built, without what compiling and LoRA put around it."""
    parts = [part for part in name.split(".") if part not in ("_orig_mod", "base_layer")]
    return ".".join(parts)


def _named_projections(model: nn.Module, names: Collection[str], is_key: bool) -> Iterator[tuple[str, bool]]:
    """Yield (name, is_key) of the modules with these names: whole dotted names, or their last parts."""
    for wanted in names:
        found = [
            name
            for name, _ in model.named_modules(remove_duplicate=False)
            if name == wanted or name.endswith(f".{wanted}")
        ]
        if not found:
            linear = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
            candidates = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(
                f"No module of the model is named '{wanted}'. Its linear layers are named {candidates}."
            )
        yield from ((name, is_key) for name in found)


def base_layer(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module]:
    """Return the (parent, attribute, module) to wrap for a name.

    That is the module of this name itself, or if a LoRA layer stands in its place, the one that the LoRA
    layer holds.
    """
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module = parent.get_submodule(attribute)
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        parent, attribute, module = module, "base_layer", inner
    return parent, attribute, module


@beartype
def wrap_cross_attentions_(
    model: nn.Module,
    *,
    C: Tensor | InputCovariance | None,
    key_names: Collection[str] | None = None,
    value_names: Collection[str] | None = None,
    **layer_options: Any,  # `Rank1EditModule` checks them
) -> dict[str, Rank1EditModule]:
    """Replace each text key and value projection of a model by a `Rank1EditModule`, in place.

    Args:
        model: a diffusers denoiser (the UNets of SD 1.x, SD 2.x and SDXL, PixArt's transformer), or any
            module if names are given.
        C: the input covariance, shape (d, d), shared by all layers; None for layers that only apply loaded
            concepts.
        key_names: names of the key projections: a whole dotted name, or its last part ("to_k") for all that
            end so. By default the cross attentions are found.
        value_names: names of the value projections, likewise.
        **layer_options: options of `Rank1EditModule`.

    Returns:
        The new layers by the names of the projections.

    Raises:
        ValueError: nothing was found, or a projection cannot be wrapped; the model is left as it was.

    Example:
        >>> model = nn.ModuleDict({"to_k": nn.Linear(8, 16), "to_v": nn.Linear(8, 16)})
        >>> list(wrap_cross_attentions_(model, C=torch.eye(8), key_names=["to_k"], value_names=["to_v"]))
        ['to_k', 'to_v']
    """
    covariance = InputCovariance(C) if isinstance(C, Tensor) else C

    def layer(name: str, projection: nn.Linear, is_key: bool) -> Rank1EditModule:
        return Rank1EditModule(projection, C=covariance, is_key_proj=is_key, **layer_options)

    model = uncompiled(model)
    return wrap_projections_(model, _projections_to_wrap(model, key_names, value_names), layer, covariance)


def wrap_projections_(
    model: nn.Module,
    projections: Mapping[str, bool],
    layer: Callable[[str, nn.Linear, bool], Wrapped],
    covariance: InputCovariance | None = None,
) -> dict[str, Wrapped]:
    """Put a layer in the place of each of a model's projections, in place.

    Args:
        model: the model.
        projections: whether a projection makes keys, by its name in the model.
        layer: returns the layer for a name, as it was in the model as built, a projection and its kind.
        covariance: where the layers have one, it is checked to fit.

    Returns:
        The layers by the names of the projections.

    Raises:
        ValueError: a projection cannot be wrapped; the model is left as it was.
    """
    places = [_Place(name, is_key, *base_layer(model, name)) for name, is_key in projections.items()]
    _check_places(places, covariance)  # all of them before one is wrapped, because wrapping freezes
    wrapped: dict[str, Wrapped] = {}
    shared: dict[int, Wrapped] = {}  # a projection that stands in several places is wrapped once
    for place in places:
        name = plain_name(place.name)
        if id(place.module) not in shared:
            shared[id(place.module)] = layer(name, cast(nn.Linear, place.module), place.is_key)
            take_over_hooks_(shared[id(place.module)], place.module)
        wrapped[name] = shared[id(place.module)]
        setattr(place.parent, place.attribute, wrapped[name])
    return wrapped


class _Place(NamedTuple):
    """Where a projection stands in a model."""

    name: str
    is_key: bool
    parent: nn.Module
    attribute: str
    module: nn.Module


def _projections_to_wrap(
    model: nn.Module, key_names: Collection[str] | None, value_names: Collection[str] | None
) -> dict[str, bool]:
    """Return whether a projection is a key's, by its name; a ValueError if there are none, or one is both."""
    if key_names is None and value_names is None:
        found = list(cross_attention_projections(model))
    else:
        found = [
            *_named_projections(model, key_names or (), True),
            *_named_projections(model, value_names or (), False),
        ]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no cross attention that diffusers marks as such. "
            "Name its projections with `key_names` and `value_names`."
        )
    projections: dict[str, bool] = {}
    for name, is_key in found:
        if projections.setdefault(name, is_key) != is_key:
            raise ValueError(f"'{name}' must be a key or a value projection, but is named as both.")
    return projections


def _check_places(places: Collection[_Place], covariance: InputCovariance | None) -> None:
    """Raise a ValueError if a projection cannot be wrapped, or stands as a key here and as a value there."""
    kinds: dict[int, bool] = {}
    for place in places:
        if kinds.setdefault(id(place.module), place.is_key) != place.is_key:
            raise ValueError(
                f"'{place.name}' must be a key or a value projection, "
                "but the same module is the other one elsewhere."
            )
        check_projection(place.name, place.module)
        if covariance is not None and place.module.in_features != covariance.dim:
            raise ValueError(
                f"'{place.name}' takes {place.module.in_features} features, "
                f"but the covariance is of {covariance.dim}. Take this model's text encoder."
            )


@beartype
def make_key_value_proj_rank1_edit_modules_(
    cross_attention: nn.Module,
    *,
    C: Tensor | InputCovariance | None,
    key_proj_name: str | None = None,
    value_proj_name: str | None = None,
    **layer_options: Any,  # `Rank1EditModule` checks them
) -> dict[str, Rank1EditModule]:
    """Wrap the key and the value projection of one cross attention, in place.

    Args:
        cross_attention: the module that holds both.
        C: the input covariance, see `wrap_cross_attentions_`.
        key_proj_name: the key projection's attribute, such as "to_keys"; by default that of a diffusers
            attention.
        value_proj_name: the value projection's attribute, likewise.
        **layer_options: options of `Rank1EditModule`.

    Returns:
        The new layers by name.

    Raises:
        ValueError: only one of the names is given, or for the reasons that `wrap_cross_attentions_` gives.

    Example:
        >>> attention = nn.ModuleDict({"to_keys": nn.Linear(8, 16), "to_values": nn.Linear(8, 16)})
        >>> layers = make_key_value_proj_rank1_edit_modules_(
        ...     attention, C=torch.eye(8), key_proj_name="to_keys", value_proj_name="to_values"
        ... )
        >>> attention["to_keys"].is_key_proj, attention["to_values"].is_key_proj
        (True, False)
    """
    if key_proj_name is None and value_proj_name is None:
        return wrap_cross_attentions_(cross_attention, C=C, **layer_options)
    if key_proj_name is None or value_proj_name is None:
        raise ValueError(
            f"`key_proj_name` and `value_proj_name` must be given together, got {key_proj_name!r} and "
            f"{value_proj_name!r}."
        )
    return wrap_cross_attentions_(
        cross_attention, C=C, key_names=[key_proj_name], value_names=[value_proj_name], **layer_options
    )


@beartype
def unwrap_cross_attentions_(model: nn.Module) -> None:
    """Put back the very modules that `wrap_cross_attentions_` replaced, with their `requires_grad`, in place.

    Example:
        >>> model = nn.ModuleDict({"to_k": nn.Linear(8, 16)})
        >>> to_k = model["to_k"]
        >>> _ = wrap_cross_attentions_(model, C=None, key_names=["to_k"])
        >>> unwrap_cross_attentions_(model)
        >>> model["to_k"] is to_k
        True
    """
    for parent in list(model.modules()):
        for attribute, module in list(parent._modules.items()):  # `named_children` names a shared module once
            if isinstance(module, WrappedProjection):
                original = module.original.restored(module)
                take_over_hooks_(original, module)
                setattr(parent, attribute, original)


def layers_to_train(model: nn.Module) -> list[Rank1EditModule]:
    """Return the wrapped layers of a model, each once.

    Every training step calls this, and `modules()` takes long over the thousands of modules of a large model.

    Raises:
        ValueError: there are none, or a module with fused projections bypasses them.
    """
    layers: list[Rank1EditModule] = []
    seen = {id(model)}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, Rank1EditModule):
            layers.append(module)
        children = [child for child in module._modules.values() if child is not None]
        wrapped = next((child for child in children if isinstance(child, Rank1EditModule)), None)
        if wrapped is not None and _bypass(module, wrapped.in_features) is not None:
            name = next(name for name, other in model.named_modules() if other is module)
            check_not_bypassed(name, module, wrapped.in_features)
        for child in children:
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no wrapped layer. Call `wrap_cross_attentions_` on it first."
        )
    return layers
