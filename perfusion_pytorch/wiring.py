"""Find the cross-attention projections of a model, wrap and unwrap them, and hand them what a training step needs."""

from collections.abc import Collection

from beartype import beartype
from torch import Tensor, nn

from perfusion_pytorch.layers.checks import check_projection
from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.layers.rank1_edit import Rank1EditModule


def _is_fused(module):
    """Tell whether an attention computes keys and values in one; its processor says so, since `fused_projections` stays True ever after."""
    return type(getattr(module, "processor", None)).__name__.startswith("Fused")


def cross_attention_projections(model):
    """Yield (name, is_key) of the text key and value projections of a diffusers model.

    Layers with `add_k_proj` take the text there, and their `to_k` is self-attention (Kandinsky, DeepFloyd); all others say
    `is_cross_attention`.
    """
    for name, module in model.named_modules(remove_duplicate=False):
        if getattr(module, "add_k_proj", None) is not None:
            attributes = ("add_k_proj", "add_v_proj")
        elif getattr(module, "is_cross_attention", False) and hasattr(module, "to_k"):
            attributes = ("to_k", "to_v")
        else:
            continue
        if _is_fused(module):
            raise ValueError(
                f"'{name}' has fused projections, which would bypass the edit. Call `unfuse_qkv_projections()` first."
            )
        for attribute, is_key in zip(attributes, (True, False), strict=True):
            yield f"{name}.{attribute}".removeprefix("."), is_key


def _named_projections(model, names, is_key):
    """Yield (name, is_key) of the modules that a name means: a whole dotted name, or its last part for all that end in it."""
    for wanted in names:
        found = [
            name
            for name, _ in model.named_modules(remove_duplicate=False)
            if name == wanted or name.endswith(f".{wanted}")
        ]
        if not found:
            candidates = sorted(
                {
                    name.rpartition(".")[2]
                    for name, module in model.named_modules()
                    if isinstance(module, nn.Linear)
                }
            )
            raise ValueError(
                f"No module of the model is named '{wanted}'. Its linear layers are named {candidates}."
            )
        yield from ((name, is_key) for name in found)


def base_layer(model, name):
    """Return the (parent, attribute, module) to wrap for a name: the module itself, or what a LoRA layer in its place holds."""
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module = getattr(parent, attribute)
    while hasattr(module, "base_layer"):
        parent, attribute, module = module, "base_layer", module.base_layer
    return parent, attribute, module


@beartype
def wrap_cross_attentions_(
    model: nn.Module,
    *,
    C: Tensor | InputCovariance | None,
    key_names: Collection[str] | None = None,
    value_names: Collection[str] | None = None,
    **layer_options,
) -> dict[str, Rank1EditModule]:
    """Put a `Rank1EditModule` in the place of each text key and value projection of a model, in place.

    Args:
        model: a diffusers denoiser (the UNets of SD 1.x, SD 2.x and SDXL, PixArt's transformer), or any module if names are given.
        C: the input covariance, shape (d, d), shared by all layers; None for layers that only apply loaded concepts.
        key_names, value_names: names of the key and of the value projections; a whole dotted name, or its last part ("to_k") for all that
            end so. By default the cross attentions are found.
        **layer_options: for `Rank1EditModule`.

    Returns:
        The new layers by the names of the projections.

    Raises:
        ValueError: nothing was found, or a projection cannot be wrapped; the model is left as it was.

    Example:
        >>> model = nn.ModuleDict({"to_k": nn.Linear(8, 16), "to_v": nn.Linear(8, 16)})
        >>> list(wrap_cross_attentions_(model, C=torch.eye(8), key_names=["to_k"], value_names=["to_v"]))
        ['to_k', 'to_v']
    """
    if key_names is None and value_names is None:
        projections = list(cross_attention_projections(model))
    else:
        projections = [
            *_named_projections(model, key_names or (), True),
            *_named_projections(model, value_names or (), False),
        ]
    if not projections:
        raise ValueError(
            f"{type(model).__name__} has no cross attention that diffusers marks as such. Name its projections with `key_names` "
            "and `value_names`."
        )
    projections = dict.fromkeys(projections)  # one may be named twice
    for name, is_key in projections:
        if (name, not is_key) in projections:
            raise ValueError(f"'{name}' must be a key or a value projection, but is named as both.")
    if C is not None and not isinstance(C, InputCovariance):
        C = InputCovariance(C)
    places = [(name, is_key, *base_layer(model, name)) for name, is_key in projections]
    # Every projection is checked before one is wrapped, because wrapping freezes.
    kinds = {}
    for name, is_key, _, _, module in places:
        if kinds.setdefault(id(module), is_key) != is_key:
            raise ValueError(
                f"'{name}' must be a key or a value projection, but the same module is the other one elsewhere."
            )
        check_projection(name, module)
        if C is not None and module.in_features != C.dim:
            raise ValueError(
                f"'{name}' takes {module.in_features} features, but the covariance is of {C.dim}. Take this model's text encoder."
            )
    wrapped, shared = {}, {}  # a projection that stands in several places is wrapped once, for all of them
    for name, is_key, parent, attribute, module in places:
        if id(module) not in shared:
            shared[id(module)] = Rank1EditModule(module, C=C, is_key_proj=is_key, **layer_options)
        wrapped[name] = shared[id(module)]
        setattr(parent, attribute, wrapped[name])
    return wrapped


@beartype
def make_key_value_proj_rank1_edit_modules_(
    cross_attention: nn.Module,
    *,
    C: Tensor | InputCovariance | None,
    key_proj_name: str | None = None,
    value_proj_name: str | None = None,
    **layer_options,
) -> dict[str, Rank1EditModule]:
    """Wrap the key and the value projection of one cross attention, in place.

    Args:
        cross_attention: the module that holds both.
        C: the input covariance, see `wrap_cross_attentions_`.
        key_proj_name, value_proj_name: their attributes, such as "to_keys"; by default those of a diffusers attention.
        **layer_options: for `Rank1EditModule`.

    Returns:
        The new layers by name.

    Raises:
        ValueError: only one of the names is given, or as `wrap_cross_attentions_`.

    Example:
        >>> attention = nn.ModuleDict({"to_keys": nn.Linear(8, 16), "to_values": nn.Linear(8, 16)})
        >>> layers = make_key_value_proj_rank1_edit_modules_(
        ...     attention, C=torch.eye(8), key_proj_name="to_keys", value_proj_name="to_values"
        ... )
        >>> attention["to_keys"].is_key_proj, attention["to_values"].is_key_proj
        (True, False)
    """
    names = (key_proj_name, value_proj_name)
    if names == (None, None):
        return wrap_cross_attentions_(cross_attention, C=C, **layer_options)
    if None in names:
        raise ValueError(
            f"`key_proj_name` and `value_proj_name` must be given together, got {key_proj_name!r} and {value_proj_name!r}."
        )
    return wrap_cross_attentions_(
        cross_attention, C=C, key_names=[key_proj_name], value_names=[value_proj_name], **layer_options
    )


@beartype
def unwrap_cross_attentions_(model: nn.Module) -> None:
    """Put the very modules back that `wrap_cross_attentions_` replaced, with their `requires_grad`, in place.

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
            if isinstance(module, Rank1EditModule):
                setattr(parent, attribute, module.original.restored(module))


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
        if any(isinstance(child, Rank1EditModule) for child in children) and _is_fused(module):
            name = next(name for name, other in model.named_modules() if other is module)
            raise ValueError(
                f"'{name}' has fused projections, which bypass the edit. Call `unfuse_qkv_projections()` first."
            )
        for child in children:
            if id(child) not in seen:
                seen.add(id(child))
                waiting.append(child)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no wrapped layer. Call `wrap_cross_attentions_` on it first."
        )
    return layers
