"""Likeness of pictures to the training pictures and to their prompts, by CLIP and DINO.

Axes: b pictures, t training pictures, f features of an embedding.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from perfusion_pytorch.extras import required
from perfusion_pytorch.hub import check_is_available

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_MODEL = "openai/clip-vit-base-patch32"
DINO_MODEL = "facebook/dinov2-small"
CLIP_TEXT, CLIP_IMAGE, DINO = "CLIP text", "CLIP image", "DINO"
BATCH = 32

Scores = dict[str, list[float]]  # by the name of what is measured: a number for each picture


class Measure(Protocol):
    """Something that gives pictures numbers."""

    def scores(self, pictures: Sequence["Image"], texts: Sequence[str]) -> Scores:
        """Return what it measures of pictures, given what each is to show, in plain words."""
        ...

    def ceiling(self) -> Scores:
        """Return the same of each training picture, compared with the others."""
        ...

    def to(self, device: torch.device | str) -> None:
        """Move its model to a device."""
        ...


class ClipMeasure:
    """Cosines of CLIP's embeddings: of a picture with its text, and with each training picture, averaged.

    Args:
        model: name or folder of a CLIP model for transformers.
        training: the training pictures.

    Raises:
        ValueError: the model cannot be loaded.
    """

    def __init__(self, model: str | os.PathLike[str], training: Sequence["Image"]) -> None:
        transformers = required("transformers")
        with _loading("clip_model", "a CLIP model", model):
            kind = transformers.AutoConfig.from_pretrained(model).model_type
            if kind != "clip":  # which transformers would load all the same, with random weights
                raise ValueError(f"it is a model of the kind {kind!r}. Choose one of CLIP.")
            self.processor = transformers.CLIPProcessor.from_pretrained(model)
            self.network = transformers.CLIPModel.from_pretrained(model).eval()
        self.training = self.embed(training)

    def to(self, device: torch.device | str) -> None:
        """Move the model to a device."""
        self.network.to(device)

    @torch.no_grad()
    def embed(self, pictures: Sequence["Image"]) -> Tensor:
        """Return the embeddings of pictures, of length 1, shape (b, f)."""
        rows = []
        for batch in _batches(pictures):
            inputs = self.processor(images=list(batch), return_tensors="pt").to(self.network.device)
            rows.append(_pooled(self.network.get_image_features(**inputs)))
        return _unit(torch.cat(rows))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return the embeddings of texts, of length 1, shape (b, f). What is too long is cut off."""
        rows = []
        for batch in _batches(texts):
            inputs = self.processor(text=list(batch), return_tensors="pt", padding=True, truncation=True)
            rows.append(_pooled(self.network.get_text_features(**inputs.to(self.network.device))))
        return _unit(torch.cat(rows))

    def scores(self, pictures: Sequence["Image"], texts: Sequence[str]) -> Scores:
        """Return "CLIP image" and "CLIP text" of pictures."""
        embedded = self.embed(pictures)
        aligned = (embedded * self.embed_texts(texts)).sum(dim=1)
        return {CLIP_IMAGE: likeness(embedded, self.training), CLIP_TEXT: aligned.tolist()}

    def ceiling(self) -> Scores:
        """Return "CLIP image" of the training pictures among themselves."""
        return {CLIP_IMAGE: likeness_among(self.training)}


class DinoMeasure:
    """Cosines of DINO's embeddings of a picture and of each training picture, averaged.

    The embedding is that of the class token after the last layer, as in DreamBooth (Ruiz et al. 2023).

    Args:
        model: name or folder of a DINO or DINOv2 model for transformers.
        training: the training pictures.

    Raises:
        ValueError: the model cannot be loaded, or is not a vision transformer.
    """

    def __init__(self, model: str | os.PathLike[str], training: Sequence["Image"]) -> None:
        transformers = required("transformers")
        with _loading("dino_model", "a DINO model", model):
            config = transformers.AutoConfig.from_pretrained(model)
            if getattr(config, "text_config", None) is not None:
                raise ValueError(f"it is a model of the kind {config.model_type!r}, which reads texts too.")
            self.processor = transformers.AutoImageProcessor.from_pretrained(model)
            self.network = transformers.AutoModel.from_pretrained(model).eval()
        self.training = self.embed(training)

    def to(self, device: torch.device | str) -> None:
        """Move the model to a device."""
        self.network.to(device)

    @torch.no_grad()
    def embed(self, pictures: Sequence["Image"]) -> Tensor:
        """Return the embeddings of pictures, of length 1, shape (b, f)."""
        rows = []
        for batch in _batches(pictures):
            inputs = self.processor(images=list(batch), return_tensors="pt").to(self.network.device)
            tokens = getattr(self.network(**inputs), "last_hidden_state", None)
            if tokens is None or tokens.ndim != 3:
                raise ValueError(
                    "`dino_model` must be a vision transformer such as DINO's, with a class token, got "
                    f"{type(self.network).__name__}."
                )
            rows.append(tokens[:, 0])
        return _unit(torch.cat(rows))

    def scores(self, pictures: Sequence["Image"], texts: Sequence[str]) -> Scores:
        """Return "DINO" of pictures."""
        return {DINO: likeness(self.embed(pictures), self.training)}

    def ceiling(self) -> Scores:
        """Return "DINO" of the training pictures among themselves."""
        return {DINO: likeness_among(self.training)}


def likeness(pictures: Tensor, training: Tensor) -> list[float]:
    """Return, for each picture, the mean of its cosines with all training pictures.

    Args:
        pictures: shape (b, f), of length 1.
        training: shape (t, f), likewise.

    Example:
        >>> likeness(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        [0.5, 0.5]
    """
    means: list[float] = (pictures @ training.to(pictures).T).mean(dim=1).tolist()
    return means


def likeness_among(training: Tensor) -> list[float]:
    """Return, for each training picture, the mean of its cosines with the others; nothing of a single one.

    Example:
        >>> likeness_among(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]))
        [0.5, 0.0, 0.5]
    """
    count = len(training)
    if count < 2:
        return []
    means: list[float] = (((training @ training.T).sum(dim=1) - 1) / (count - 1)).tolist()
    return means


def picture_change(one: "Image", other: "Image") -> float:
    """Return the mean absolute difference of two pictures' numbers, of 255."""
    first, second = (
        torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).float()
        for image in (one, other)
    )
    return (first - second).abs().mean().item()


def _batches(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    return (items[first : first + BATCH] for first in range(0, len(items), BATCH))


def _pooled(result: Any) -> Tensor:
    """Return the features that a CLIP model returns alone, or in newer versions among others."""
    features: Tensor = getattr(result, "pooler_output", result)
    return features


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=1)


@contextmanager
def _loading(argument: str, kind: str, model: str | os.PathLike[str]) -> Iterator[None]:
    """Let a model that cannot be loaded be one error, which names it."""
    try:
        check_is_available(str(model), filename="config.json")
        yield
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"`{argument}` must be {kind}'s name or folder, but {str(model)!r} cannot be loaded: {error}"
        ) from error
