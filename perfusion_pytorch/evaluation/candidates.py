"""The files that are compared: concepts of Perfusion, LoRAs and textual inversions, told by their content."""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from perfusion_pytorch.concept import Concept
from perfusion_pytorch.concept_file import ABOUT, RUN_FILE
from perfusion_pytorch.files import described, sha256_of
from perfusion_pytorch.hub import find_concept, hub_name

PERFUSION, LORA, INVERSION = "Perfusion", "LoRA", "textual inversion"
KNOBS = {PERFUSION: "beta", LORA: "scale", INVERSION: None}  # what is swept, as the JSON says it
SYMBOLS = {"beta": "β", "scale": "scale"}
# The files that training scripts write into their folders.
USUAL_FILES = (
    RUN_FILE,
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "learned_embeds.safetensors",
)
LORA_MARK = re.compile(r"lora[_.](A|B|down|up|linear_layer)\b")  # in the names of a LoRA's tensors
SDXL_ROWS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # of a textual inversion for SDXL
NAMELESS = ("emb_params", "*")  # keys of textual inversions that are not their token


@dataclass(frozen=True)
class Candidate:
    """A file that is evaluated.

    Attributes:
        name: what tables and pictures call it.
        path: the file.
        kind: "Perfusion", "LoRA" or "textual inversion".
        words: what stands for the thing in prompts: a token, or such as "sks car".
        digest: of all that its pictures depend on, but for its strength.
        superclass: what the file says the thing is; None if it says nothing.
    """

    name: str
    path: Path
    kind: str
    words: str
    digest: str
    superclass: str | None = None

    @property
    def knob(self) -> str | None:
        """What is swept: "beta", "scale" or nothing."""
        return KNOBS[self.kind]

    def label(self, strength: float | None) -> str:
        """Return a strength as tables show it, such as "β 0.5"."""
        return "" if strength is None or self.knob is None else f"{SYMBOLS[self.knob]} {strength:g}"


def candidates_of(
    files: Sequence[str | os.PathLike[str]], words: str | Mapping[str, str] | None
) -> list[Candidate]:
    """Read what the files are; nothing in them is executed.

    Args:
        files: files, the folders of training runs, or names of concepts on the hub.
        words: what stands for the thing in prompts of LoRAs, and of textual inversions that do not name their
            token: for all of them, or by the path that is given in `files`.

    Raises:
        OSError: a file does not exist, or the hub does not give it.
        ValueError: a file is damaged, of another kind, or given twice; or its words are missing.
    """
    given = {os.fspath(file): file_in(file) for file in files}
    by_file = dict.fromkeys(given, words) if isinstance(words, str) else dict(words or {})
    if unknown := sorted(by_file.keys() - given.keys()):
        raise ValueError(f"`words` must name one of the files {list(given)}, got {unknown[0]!r}.")
    twice = [str(path) for path, count in Counter(p.resolve() for p in given.values()).items() if count > 1]
    if twice or len(given) < len(files):
        raise ValueError(f"Each file must be given once, got one several times: {twice or list(given)}.")
    if not given:
        raise ValueError("`files` must hold at least one concept file, got none.")
    found = [candidate_of(path, by_file.get(name)) for name, path in given.items()]
    for name, candidate in zip(given, found, strict=True):
        if not isinstance(words, str) and name in by_file and candidate.kind == PERFUSION:
            raise ValueError(f"`words` must not name {name}, which says its own token, {candidate.words!r}.")
    names = [candidate.name for candidate in found]
    return [
        replace(candidate, name=f"{candidate.name} {i}") if names.count(candidate.name) > 1 else candidate
        for i, candidate in enumerate(found, 1)
    ]


def file_in(path: str | os.PathLike[str]) -> Path:
    """Return a path, the file in a folder that a training script wrote, or what a name on the hub stands for.

    Raises:
        OSError: there is nothing, the folder has no such file, or the hub does not give it.
    """
    if hub_name(path) is not None:
        return find_concept(path)
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in USUAL_FILES if (path / name).is_file()]
        if not found:
            held = sorted(file.name for file in path.glob("*.safetensors"))
            raise FileNotFoundError(
                f"The folder {path} must hold one of {', '.join(USUAL_FILES)}, but holds {held}. "
                "Name the file."
            )
        return found[0]
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    return path


def candidate_of(path: Path, words: str | None) -> Candidate:
    """Read what one file is; see `candidates_of`."""
    shapes, metadata = _header_of(path)
    name = path.parent.resolve().name if path.name in USUAL_FILES else path.stem
    if ABOUT in metadata:
        concept = Concept.load(path)
        parts = [*described(concept.tensors()), str((concept.eval_gate[1], concept.gates_removal))]
        digest = sha256_of([concept.token, *parts])  # not of the β that it recommends
        return Candidate(name, path, PERFUSION, concept.token, digest, concept.superclass)
    digest = sha256_of([path.read_bytes(), *_beside(path), words or ""])
    if any(LORA_MARK.search(key) for key in shapes):
        if words is None:
            raise ValueError(
                f"{path} is a LoRA, which does not say what stands for the thing in prompts. Give the words "
                "that it was trained with, such as 'sks car', as `words`."
            )
        return Candidate(name, path, LORA, words, digest)
    if shapes and (shapes.keys() <= SDXL_ROWS.keys() or (len(shapes) == 1 and _are_rows(shapes))):
        token = words or next(iter(shapes))
        if words is None and (token in NAMELESS or token in SDXL_ROWS):
            raise ValueError(
                f"{path} is a textual inversion that does not say its token. Choose one, such as "
                "'<my-thing>', as `words`."
            )
        return Candidate(name, path, INVERSION, token, digest)
    raise ValueError(
        f"{path} must be a concept of Perfusion, a LoRA or a textual inversion, but its tensors are "
        f"{list(shapes)[:3]}. Name the file that training wrote."
    )


def superclass_of(candidates: Sequence[Candidate]) -> str:
    """Return the superclass that the concept files say.

    Raises:
        ValueError: none says it, or they differ.
    """
    found = sorted({candidate.superclass for candidate in candidates if candidate.superclass is not None})
    if len(found) != 1:
        said = f"the concept files say {found}" if found else "no file says it"
        raise ValueError(
            f"`superclass` must be given, since {said}. Give the words for the kind of thing, such as 'car'."
        )
    return found[0]


def _header_of(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Return the shapes of a safetensors file's tensors by name, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            return shapes, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, but it cannot be read: {error}. Others, such as .bin "
            "and .pt, can run code when they are opened: convert it first."
        ) from error


def _are_rows(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return all(len(shape) in (1, 2) for shape in shapes.values())


def _beside(path: Path) -> list[bytes]:
    """Return the configuration that peft writes beside a LoRA, which holds its scale."""
    config = path.with_name("adapter_config.json")
    return [config.read_bytes()] if config.is_file() else []
