"""The input covariance of a pipeline, computed once and kept in a file keyed by all that it depends on."""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.captions.sources import BuiltInCaptions, CaptionFile, check_words_are_known
from perfusion_pytorch.embedding import EmbeddingWrapper
from perfusion_pytorch.files import described, sha256_of, write_atomically
from perfusion_pytorch.layers.covariance import InputCovariance, calculate_input_covariance
from perfusion_pytorch.layers.covariance_file import covariance_bytes, read_covariance
from perfusion_pytorch.pipelines.encoding import prompt_encoder
from perfusion_pytorch.pipelines.model_notes import notes_of
from perfusion_pytorch.pipelines.parts import text_encoders_of
from perfusion_pytorch.protocols import Pipeline, TextEncoder, Tokenizer
from perfusion_pytorch.token_wiring import input_embedding
from perfusion_pytorch.tokens import UNWRITTEN
from perfusion_pytorch.user_warnings import warn_user

CACHE_VERSION = 1  # of how the covariance is computed: raising it invalidates older files
RIDGE = 1e-6  # fills the one direction that a text encoder's last layer norm may leave empty
BATCH_SIZE = 64

Captions: TypeAlias = Iterable[str] | str | os.PathLike[str] | None


@beartype
def cached_covariance(
    pipe: Pipeline,
    captions: Captions = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    ridge: float | int = RIDGE,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> InputCovariance:
    """Return the input covariance of a pipeline's text encodings: from the cache, or computed and put there.

    Args:
        pipe: a pipeline of Stable Diffusion 1.x, 2.x or XL.
        captions: what to estimate it from (the paper uses 100K captions): texts, or the path of a text file
            with one a line; by default those that the model's folder names (see `notes_of`), else
            `BuiltInCaptions()`. They are read several times, a few at a time, so
            that a file of any length needs no memory; an iterator is made a list first.
        cache_dir: folder of the cache; by default $PERFUSION_CACHE, else ~/.cache/perfusion_pytorch.
        ridge: see `InputCovariance`.
        batch_size: captions at a time.
        progress: show a progress bar on stderr, where tqdm is installed.

    Returns:
        The covariance, the same to the bit whether it was found or computed.

    Raises:
        ValueError: there are no captions, most of their words are unknown to a tokenizer, or the text
            encoders hold no weights.

    Warns:
        UserWarning: the cached file is damaged, so that it is computed again, or the folder cannot be
            written.

    Example:
        covariance = cached_covariance(pipe)  # minutes the first time, then at once
        wrap_cross_attentions_(pipe.unet, C=covariance)
    """
    texts = _texts_of(pipe, captions)
    encode = prompt_encoder(pipe)
    for _, tokenizer in text_encoders_of(pipe).values():
        check_words_are_known(tokenizer, texts)
    path = covariance_path(pipe, texts, cache_dir=cache_dir, ridge=ridge)
    key = path.stem.removeprefix("covariance-")
    found = _cached(path, key, warns=True)
    if found is not None:
        return found
    covariance = calculate_input_covariance(
        texts,
        encode,
        batch_size=batch_size,
        ridge=ridge,
        progress=_bar(texts, batch_size) if progress else None,
    )
    # Another process may have been as far, in other batches: all get one matrix, the same to the bit.
    found = _cached(path, key, warns=False)
    if found is not None:
        return found
    # In float64, since float32's rounding shows where C is ill-conditioned.
    facts = {"num_tokens": covariance.num_tokens, "ridge": covariance.ridge}
    data = covariance_bytes(covariance.matrix, facts, key=key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        warn_user(
            f"The covariance cannot be cached ({error}). Choose another folder by `cache_dir` or "
            "$PERFUSION_CACHE."
        )
    return _checked(data, key)


@beartype
def covariance_path(
    pipe: Pipeline,
    captions: Captions = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    ridge: float | int = RIDGE,
) -> Path:
    """Return where the covariance of a pipeline and captions is cached, whether or not the file exists."""
    encoders = text_encoders_of(pipe)
    concepts = sorted({token for pair in encoders.values() for token in _concept_rows(*pair)})
    used: set[str] = set()

    def encoded_captions() -> Iterator[bytes]:
        for caption in _texts_of(pipe, captions):
            used.update(token for token in concepts if token in caption)
            yield caption.encode("utf-8", "surrogatepass") + b"\0"

    captions_digest = sha256_of(encoded_captions())  # also finds out which concepts are used
    depends_on = {
        "version": CACHE_VERSION,
        "captions": captions_digest,
        "encoders": {name: _encoder_digest(*pair, used) for name, pair in encoders.items()},
        "positions": "all, padding included",
        "ridge": float(ridge),
    }
    key = sha256_of([json.dumps(depends_on, sort_keys=True)])
    return cache_folder(cache_dir) / f"covariance-{key[:40]}.safetensors"


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the cache: the given one, else $PERFUSION_CACHE, else one in the home folder."""
    folder = cache_dir or os.environ.get("PERFUSION_CACHE") or Path.home() / ".cache" / "perfusion_pytorch"
    return Path(folder).expanduser()


def default_captions(pipe: Pipeline) -> BuiltInCaptions | CaptionFile:
    """Return the captions that a covariance is estimated from by default: the model's own or built-in ones.

    Raises:
        ValueError: the notes in the model's folder are damaged.
    """
    path = notes_of(pipe).captions
    return BuiltInCaptions() if path is None else CaptionFile(path)


def _texts_of(pipe: Pipeline, captions: Captions) -> Iterable[str]:
    """Return captions as texts that can be read several times."""
    if captions is None:
        return default_captions(pipe)
    if isinstance(captions, (str, os.PathLike)):
        return CaptionFile(captions)
    return list(captions) if isinstance(captions, Iterator) else captions


# ----------------------------------------------------------------------------------- what the key depends on


def _concept_rows(encoder: TextEncoder, tokenizer: Tokenizer) -> dict[str, Tensor]:
    """Return the embedding rows of concepts by token."""
    embedding = input_embedding(encoder)
    if not isinstance(embedding, EmbeddingWrapper):
        return {}
    tokens = tokenizer.convert_ids_to_tokens(list(embedding.concept_ids))
    return dict(zip(tokens, embedding.concept_embedding, strict=True))


def _encoder_digest(encoder: TextEncoder, tokenizer: Tokenizer, used: Collection[str]) -> str:
    """Return the hash of a text encoder's weights and configuration and of its tokenizer.

    Of concepts, only those that captions use count.
    """
    rows = _concept_rows(encoder, tokenizer)
    state = {
        name: tensor
        for name, tensor in encoder.state_dict().items()
        if not name.endswith("concept_embedding")
    }
    state |= {token: row for token, row in rows.items() if token in used}
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(
                f"The text encoder must hold its weights, but '{name}' is on the meta device. Load it "
                "without offloading to disk."
            )
    config = {
        key: value
        for key, value in encoder.config.to_dict().items()
        if not key.startswith(("_", "transformers", "eos_token_id"))
    }
    modules: Iterable[tuple[str, Any]] = encoder.named_modules()
    adapters = [
        (name, str(module.active_adapters), str(module.scaling), str(module.merged))
        for name, module in modules
        if is_adapter(module)
    ]
    about = [type(encoder).__name__, config, adapters]
    texts = [
        json.dumps(part, sort_keys=True, default=str)
        for part in (about, tokenizer_state(tokenizer, rows, used))
    ]
    return sha256_of(chain(described(state), texts))


def is_adapter(module: nn.Module) -> bool:
    """Report whether a module is one of peft's adapter layers, whose state dict leaves its scaling out."""
    return all(hasattr(module, name) for name in ("active_adapters", "scaling", "merged"))


def tokenizer_state(tokenizer: Any, concepts: Iterable[str], used: Collection[str]) -> list[Any]:
    """Return what a tokenizer's output depends on, as JSON can hold it.

    Padding and truncation are those of its last call, and so left out: its length decides them.

    Args:
        tokenizer: fast or slow.
        concepts: tokens of all concepts.
        used: those that captions use; the others are left out.
    """
    about = [
        type(tokenizer).__name__,
        tokenizer.model_max_length,
        tokenizer.pad_token,
        tokenizer.padding_side,
    ]
    if getattr(tokenizer, "backend_tokenizer", None) is None:  # a slow one
        return [*about, tokenizer.get_vocab(), list(getattr(tokenizer, "bpe_ranks", []))]
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    unused = [re.compile(re.escape(token)) for token in concepts if token not in used]
    unused.append(re.compile(UNWRITTEN.format(r"\d+")))
    backend["added_tokens"] = [
        entry
        for entry in backend["added_tokens"]
        if not any(pattern.fullmatch(entry["content"]) for pattern in unused)
    ]
    return [*about, {name: part for name, part in backend.items() if name not in ("padding", "truncation")}]


# -------------------------------------------------------------------------------------------------- the file


def _cached(path: Path, key: str, *, warns: bool) -> InputCovariance | None:
    """Return the covariance in a file, or None where it does not exist or, with a warning, is damaged."""
    if not path.exists():
        return None
    try:
        return _checked(path.read_bytes(), key)
    except (ValueError, OSError) as error:
        if warns:
            warn_user(f"The cached covariance {path} is damaged ({error}), so it is computed again.")
        return None


def _checked(data: bytes, key: str) -> InputCovariance:
    """Return the covariance in a file's bytes.

    Raises:
        ValueError: the bytes are not those that were written for this key.
    """
    covariance, facts = read_covariance(data, key=key)
    return InputCovariance(covariance, **facts)


def _bar(captions: Iterable[str], batch_size: int) -> Callable[[Iterator[Any]], Iterable[Any]] | None:
    """Return tqdm over batches, or None where it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    total = -(-len(captions) // batch_size) if isinstance(captions, Sized) else None

    def bar(batches: Iterator[Any]) -> Iterable[Any]:
        shown: Iterable[Any] = tqdm(batches, "covariance", total, unit="batch", leave=False)
        return shown

    return bar
