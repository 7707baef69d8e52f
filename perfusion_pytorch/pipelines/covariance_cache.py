"""The input covariance of a pipeline, computed once and kept in a file that is keyed by everything that it depends on."""

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from beartype import beartype
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from perfusion_pytorch.captions.sources import BuiltInCaptions, CaptionFile, check_words_are_known
from perfusion_pytorch.concept_file import checksum
from perfusion_pytorch.embedding import UNWRITTEN, EmbeddingWrapper
from perfusion_pytorch.files import write_atomically
from perfusion_pytorch.layers.covariance import InputCovariance, calculate_input_covariance
from perfusion_pytorch.pipelines.encoding import prompt_encoder
from perfusion_pytorch.pipelines.parts import text_encoders_of

CACHE_VERSION = 1  # of how the covariance is computed and written: a higher one makes no use of older files
ABOUT = "perfusion_covariance"  # the metadata's key
RIDGE = 1e-6  # fills the one direction that a text encoder's last layer norm may leave empty
BATCH_SIZE = 64


@beartype
def cached_covariance(
    pipe,
    captions: Iterable[str] | str | os.PathLike | None = None,
    *,
    cache_dir: str | os.PathLike | None = None,
    ridge: float | int = RIDGE,
    batch_size: int = BATCH_SIZE,
    progress: bool = True,
) -> InputCovariance:
    """Return the input covariance of a pipeline's text encodings: from the cache, or computed and put there.

    Args:
        pipe: a pipeline of Stable Diffusion 1.x, 2.x or XL.
        captions: what to estimate it from, the paper's are 100K: texts, or the path of a text file with one a line; by default
            `BuiltInCaptions()`. They are gone through several times, a few at a time, so that a file of any length needs no memory; an
            iterator is made a list first.
        cache_dir: folder of the cache; by default $PERFUSION_CACHE, else ~/.cache/perfusion_pytorch.
        ridge: see `InputCovariance`.
        batch_size: captions at a time.
        progress: show a progress bar on stderr, where tqdm is installed.

    Returns:
        The covariance, bit for bit the same whether it was found or computed.

    Raises:
        ValueError: there are no captions, most of their words are unknown to a tokenizer, or the text encoders hold no weights.

    Warns:
        UserWarning: the cached file was damaged, so that it is computed again, or the folder cannot be written.

    Example:
        covariance = cached_covariance(pipe)  # once minutes, then at once
        wrap_cross_attentions_(pipe.unet, C=covariance)
    """
    captions = _captions(captions)
    encode = prompt_encoder(pipe)
    for _, tokenizer in text_encoders_of(pipe).values():
        check_words_are_known(tokenizer, captions)
    path = covariance_path(pipe, captions, cache_dir=cache_dir, ridge=ridge)
    key = path.stem.removeprefix("covariance-")
    if path.exists():
        try:
            return _checked(path.read_bytes(), key)
        except (ValueError, OSError, SafetensorError) as error:
            warnings.warn(
                f"The cached covariance {path} is damaged ({error}), so it is computed again.", stacklevel=2
            )
    covariance = calculate_input_covariance(
        captions,
        encode,
        batch_size=batch_size,
        ridge=ridge,
        progress=_bar(captions, batch_size) if progress else None,
    )
    if path.exists():  # another process was as far, in other batches: all shall have one matrix to the bit
        with suppress(ValueError, OSError, SafetensorError):
            return _checked(path.read_bytes(), key)
    data = _bytes_of(covariance, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        warnings.warn(
            f"The covariance cannot be cached ({error}). Choose another folder by `cache_dir` or $PERFUSION_CACHE.",
            stacklevel=2,
        )
    return _checked(data, key)


@beartype
def covariance_path(
    pipe,
    captions: Iterable[str] | str | os.PathLike | None = None,
    *,
    cache_dir: str | os.PathLike | None = None,
    ridge: float | int = RIDGE,
) -> Path:
    """Return where the covariance of a pipeline and captions is cached, whether or not it is there."""
    folder = cache_dir or os.environ.get("PERFUSION_CACHE") or Path.home() / ".cache" / "perfusion_pytorch"
    encoders = text_encoders_of(pipe)
    concepts = sorted(
        {token for encoder, tokenizer in encoders.values() for token in _concept_rows(encoder, tokenizer)}
    )
    digest, used = hashlib.sha256(), set()
    for caption in _captions(captions):
        digest.update(caption.encode("utf-8", "surrogatepass") + b"\0")
        used.update(token for token in concepts if token in caption)
    depends_on = {
        "version": CACHE_VERSION,
        "captions": digest.hexdigest(),
        "encoders": {name: _encoder_digest(*pair, used) for name, pair in encoders.items()},
        "positions": "all, padding included",
        "ridge": float(ridge),
    }
    key = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return Path(folder).expanduser() / f"covariance-{key[:40]}.safetensors"


def _captions(given):
    if given is None:
        return BuiltInCaptions()
    if isinstance(given, (str, os.PathLike)):
        return CaptionFile(given)
    return list(given) if isinstance(given, Iterator) else given


def _concept_rows(encoder, tokenizer):
    """Return the embedding rows of concepts by token."""
    embedding = encoder.get_input_embeddings()
    if not isinstance(embedding, EmbeddingWrapper):
        return {}
    return dict(
        zip(
            tokenizer.convert_ids_to_tokens(list(embedding.concept_ids)),
            embedding.concept_embedding,
            strict=True,
        )
    )


def _encoder_digest(encoder, tokenizer, used):
    """Return the hash of a text encoder's weights and configuration and of its tokenizer; of concepts, those that captions use."""
    rows = _concept_rows(encoder, tokenizer)
    digest = hashlib.sha256()
    state = {
        name: tensor
        for name, tensor in encoder.state_dict().items()
        if not name.endswith("concept_embedding")
    }
    state |= {token: row for token, row in rows.items() if token in used}
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(
                f"The text encoder must hold its weights, but '{name}' is on the meta device. Load it without offloading to disk."
            )
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    config = {
        key: value
        for key, value in encoder.config.to_dict().items()
        if not key.startswith(("_", "transformers", "eos_token_id"))
    }
    adapters = [
        (name, str(m.active_adapters), str(m.scaling), str(m.merged))
        for name, m in encoder.named_modules()
        if _is_adapter(m)
    ]
    digest.update(
        json.dumps([type(encoder).__name__, config, adapters], sort_keys=True, default=str).encode()
    )
    digest.update(json.dumps(_tokenizer_state(tokenizer, rows, used), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _is_adapter(module: nn.Module) -> bool:
    return all(hasattr(module, name) for name in ("active_adapters", "scaling", "merged"))  # peft's layers


def _tokenizer_state(tokenizer, concepts, used):
    """Return what a tokenizer's output depends on; padding and truncation, which are those of its last call, are given by its length."""
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
        entry for entry in backend["added_tokens"] if not any(p.fullmatch(entry["content"]) for p in unused)
    ]
    return [*about, {name: part for name, part in backend.items() if name not in ("padding", "truncation")}]


def _bytes_of(covariance, key):
    """Return the file's bytes; `InputCovariance.load` reads such a file too."""
    tensors = {
        "covariance": covariance.matrix.contiguous()
    }  # float64: float32's rounding is seen where C is ill-conditioned
    about = {"num_tokens": covariance.num_tokens, "ridge": covariance.ridge}
    metadata = {"format": "pt", "input_covariance": json.dumps(about)}
    named = {"key": key, "version": CACHE_VERSION}
    return save(
        tensors, metadata | {ABOUT: json.dumps(named | {"sha256": checksum(tensors, named, metadata)})}
    )


def _checked(data, key):
    """Return the covariance in a file's bytes, or raise an error where they are not what `_bytes_of` wrote for this key."""
    tensors = load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.get("__metadata__", {})
    named = json.loads(metadata.pop(ABOUT, "{}"))
    wanted = named.pop("sha256", None)
    if named.get("key") != key or checksum(tensors, named, metadata) != wanted:
        raise ValueError("its checksum does not fit its content")
    return InputCovariance(tensors["covariance"], **json.loads(metadata["input_covariance"]))


def _bar(captions, batch_size):
    """Return tqdm over batches, or None where it is not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    total = -(-len(captions) // batch_size) if hasattr(captions, "__len__") else None
    return lambda batches: tqdm(batches, "covariance", total, unit="batch", leave=False)
