"""Concept tokens on top of a text encoder's embedding, and prompts with the superclass in their place."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.layers.precision import kept_in_float32

OPTIONS = (
    "num_embeddings",
    "embedding_dim",
    "padding_idx",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "sparse",
)  # of nn.Embedding


@dataclass(frozen=True, eq=False)
class SuperclassPrompts:
    """Prompts with the superclass word in the concept's place. Axes: b batch, n tokens.

    Attributes:
        ids: token ids, shape (b, n).
        concept_indices: position of the concept's token in the original prompts, shape (b,); −1 in rows
            without it.
        superclass_indices: position of the superclass's last token in `ids`, shape (b,); −1 likewise.
    """

    ids: Tensor
    concept_indices: Tensor
    superclass_indices: Tensor


class EmbeddingWrapper(nn.Embedding):
    """A text encoder's token embedding, frozen, with trainable rows for concept tokens beside it.

    It takes over the embedding's own weight, under the same state-dict key; the vocabulary keeps its size, so
    every prompt without a concept token is encoded as before, and no random numbers are drawn. A concept's id
    may lie beyond the embedding's rows, or be one that the tokenizer gives to no other word (T5's embedding
    has more rows than its tokenizer has tokens). Axes: c concepts, b batch, n tokens.

    Args:
        embedding: the embedding to wrap.
        concept_ids: token id of each concept; length c.
        superclass_ids: token ids of each concept's superclass, rows of the embedding; with a superclass of
            several tokens ("teddy bear"), the concept starts at the mean of their rows.

    Attributes:
        concept_embedding: the trained rows, a float32 parameter of shape (c, features).

    Raises:
        ValueError: a superclass's id is beyond the embedding's rows or is a concept's own, or the lists do
            not fit.

    Example:
        >>> embedding = EmbeddingWrapper(nn.Embedding(10, 4), [10], [[2, 3]])
        >>> prompts = embedding.with_superclass(torch.tensor([[8, 10, 5, 9, 9]]))
        >>> prompts.ids, prompts.concept_indices, prompts.superclass_indices
        (tensor([[8, 2, 3, 5, 9]]), tensor([1]), tensor([2]))
    """

    sorted_ids: Tensor  # the concepts' ids in ascending order, (c,)
    order: Tensor  # which concept each of these is, (c,)

    @beartype
    def __init__(
        self, embedding: nn.Module, concept_ids: Sequence[int], superclass_ids: Sequence[Sequence[int]]
    ) -> None:
        if type(embedding) is not nn.Embedding:
            raise ValueError(
                f"`embedding` must be a plain nn.Embedding, got {type(embedding).__name__}. "
                "Wrap all concepts of a text encoder at once."
            )
        _check_ids(embedding.num_embeddings, concept_ids, superclass_ids)
        self._take_over(embedding, concept_ids, superclass_ids, torch.empty(0, embedding.embedding_dim))

    @classmethod
    def with_rows(
        cls,
        embedding: nn.Embedding,
        concept_ids: Sequence[int],
        superclass_ids: Sequence[Sequence[int]],
        rows: Tensor,
    ) -> "EmbeddingWrapper":
        """Return a wrapper whose first concepts have trained rows, shape (up to c, features).

        Nothing is checked, because each concept was when it came.
        """
        wrapper = cls.__new__(cls)
        wrapper._take_over(embedding, concept_ids, superclass_ids, rows.detach())
        return wrapper

    def with_concept(self, concept_id: int, superclass_ids: Sequence[int]) -> "EmbeddingWrapper":
        """Return a wrapper with one concept more, over the embedding that this one wraps.

        Raises:
            ValueError: an id does not fit.
        """
        concept_ids = (*self.concept_ids, concept_id)
        _check_superclass(self.num_embeddings, set(concept_ids), superclass_ids)
        superclasses = (*self.superclass_ids, superclass_ids)
        return self.with_rows(self.original(), concept_ids, superclasses, self.concept_embedding)

    def without_concept(self, concept_id: int) -> "EmbeddingWrapper":
        """Return a wrapper without one of several concepts, over the embedding that this one wraps."""
        kept = [i for i, own in enumerate(self.concept_ids) if own != concept_id]
        return self.with_rows(
            self.original(),
            [self.concept_ids[i] for i in kept],
            [self.superclass_ids[i] for i in kept],
            self.concept_embedding[kept],
        )

    def _take_over(
        self,
        embedding: nn.Embedding,
        concept_ids: Sequence[int],
        superclass_ids: Sequence[Sequence[int]],
        rows: Tensor,
    ) -> None:
        """Take over an embedding's weight, and add the concepts' rows: those that are given, and new ones."""
        nn.Module.__init__(self)  # nn.Embedding's own would draw random numbers
        for name in OPTIONS:
            setattr(self, name, getattr(embedding, name))
        self.weight = embedding.weight
        self._original = (embedding, embedding.weight.requires_grad)
        # (parent, attribute, module) of each place where a text encoder had its embedding
        self.places: list[tuple[nn.Module, str, nn.Embedding]] = []
        self.weight.requires_grad_(False)
        self.train(embedding.training)
        self.concept_ids = tuple(concept_ids)
        self.superclass_ids = tuple(tuple(ids) for ids in superclass_ids)
        known = rows.to(self.weight.device, torch.float32)
        new = [self.weight[list(ids)].float().mean(dim=0) for ids in self.superclass_ids[len(rows) :]]
        self.concept_embedding = nn.Parameter(torch.cat([known, *(row.unsqueeze(0) for row in new)]))
        ids, order = torch.tensor(self.concept_ids, device=self.weight.device).sort()
        self.register_buffer("sorted_ids", ids, persistent=False)
        self.register_buffer("order", order, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of token ids: shape (b, n) to (b, n, features)."""
        beyond = ids >= self.num_embeddings
        rows = super().forward(ids.masked_fill(beyond, 0))
        place = torch.searchsorted(self.sorted_ids, ids.contiguous()).clamp_max(len(self.sorted_ids) - 1)
        known = self.sorted_ids[place] == ids
        own = F.embedding(self.order[place], self.concept_embedding).to(rows.dtype)
        rows = torch.where(known.unsqueeze(-1), own, rows)
        # On a GPU the check would wait for the device in each training step.
        if ids.device.type == "cpu" and not torch.compiler.is_compiling() and (beyond & ~known).any():
            raise ValueError(
                f"Token ids must be below {self.num_embeddings} or among the concepts' "
                f"{list(self.concept_ids)}, got {ids[beyond & ~known].unique().tolist()}."
            )
        return rows

    @beartype
    def with_superclass(self, ids: Tensor, concept: int = 0) -> SuperclassPrompts:
        """Put the superclass into a concept's place.

        A superclass of several tokens moves what follows it to the right. Room is made at the end of the row:
        by padding first, then by the words before its last two tokens, so that the end of the prompt stays
        whether or not it is also the padding.

        Args:
            ids: token ids, shape (b, n).
            concept: which concept.

        Raises:
            ValueError: a row holds the concept more than once, or the superclass does not fit before the end.
        """
        token_id = self.concept_ids[concept]
        superclass = list(self.superclass_ids[concept])
        rows: list[list[int]] = []
        concept_indices: list[int] = []
        superclass_indices: list[int] = []
        for row in ids.tolist():
            count = row.count(token_id)
            if count > 1:
                raise ValueError(
                    f"A training prompt must hold the concept's token at most once, got it {count} times."
                )
            where = row.index(token_id) if count else -1
            last = where + len(superclass) - 1 if count else -1
            if count:
                row = _shortened(row[:where] + superclass + row[where + 1 :], len(row), keep=last + 1)
            rows.append(row)
            concept_indices.append(where)
            superclass_indices.append(last)
        return SuperclassPrompts(
            torch.tensor(rows, device=ids.device),
            torch.tensor(concept_indices, device=ids.device),
            torch.tensor(superclass_indices, device=ids.device),
        )

    def original(self) -> nn.Embedding:
        """Return the wrapped embedding, with what others did to its weight (textual inversion adds rows)."""
        embedding, requires_grad = self._original
        embedding.weight = self.weight
        embedding.num_embeddings = len(self.weight)
        embedding.weight.requires_grad_(requires_grad)
        embedding.train(self.training)
        return embedding

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EmbeddingWrapper":
        """Convert as every module does, but keep the trained rows in float32."""
        with kept_in_float32(self, ("concept_embedding",)):
            return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, concept_ids={list(self.concept_ids)}"


def _check_ids(vocabulary: int, concept_ids: Sequence[int], superclass_ids: Sequence[Sequence[int]]) -> None:
    """Raise a ValueError where token ids do not fit an embedding of `vocabulary` rows, or one another."""
    is_distinct = len(set(concept_ids)) == len(concept_ids)
    if not concept_ids or len(concept_ids) != len(superclass_ids) or not is_distinct:
        raise ValueError(
            f"There must be one superclass for each of several different concepts, got {concept_ids} and "
            f"{superclass_ids}."
        )
    if min(concept_ids) < 0:
        raise ValueError(f"`concept_ids` must be at least 0, got {list(concept_ids)}.")
    for ids in superclass_ids:
        _check_superclass(vocabulary, set(concept_ids), ids)


def _check_superclass(vocabulary: int, concept_ids: Collection[int], ids: Sequence[int]) -> None:
    """Raise a ValueError where a superclass's token ids are not of the vocabulary, or a concept's own."""
    if not ids or not all(0 <= i < vocabulary and i not in concept_ids for i in ids):
        raise ValueError(
            f"`superclass_ids` must be tokens of the vocabulary, from 0 to {vocabulary - 1}, at least one "
            f"each, got {ids}."
        )


def _shortened(row: list[int], length: int, keep: int) -> list[int]:
    """Cut a row of ids to a length: its padding first, then what is before its last two tokens.

    Args:
        row: token ids.
        length: of the row that is wanted.
        keep: how many of the first ids must stay.
    """
    padding = next((i for i, token in enumerate(reversed(row)) if token != row[-1]), len(row)) - 1
    row = row[: max(length, len(row) - padding)]
    if len(row) > length:
        if keep > length - 2:
            raise ValueError(
                f"The superclass must fit before the end of a row of {length} tokens. Shorten the prompt."
            )
        row = row[: length - 2] + row[-2:]
    return row
