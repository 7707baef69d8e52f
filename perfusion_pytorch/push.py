"""`push_concept`: a concept on the hub, with a model card."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perfusion_pytorch.arguments import beartype
from perfusion_pytorch.concept import Concept
from perfusion_pytorch.concept_file import RUN_FILE, concept_path
from perfusion_pytorch.extras import required
from perfusion_pytorch.files import bytes_of
from perfusion_pytorch.grids import read_picture_facts
from perfusion_pytorch.hub import FIGURES_FILE, api, quiet, reason
from perfusion_pytorch.model_card import CARD, figures_of, model_card

PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins


@beartype
def push_concept(
    path: str | os.PathLike[str],
    name: str,
    *,
    private: bool = False,
    license: str | None = None,
    pictures: Sequence[str | os.PathLike[str]] = (),
) -> str:
    """Push a concept file to the hub, where `load_concept(pipe, name)` finds it.

    It is there as `concept.safetensors`, with a model card (`README.md`), the pictures that the card shows,
    and the evaluation's figures (`evaluation.json`), where they are beside the file. All of these are written
    over, each time; other files there stay. Training pictures are never pushed.

    Args:
        path: the concept file, or a training run's folder.
        name: "user/name". The model is made if it does not exist.
        private: whether a model that is made is only for its owner; else it is as the owner's settings say.
        license: what the hub calls it, such as "cc-by-4.0", for the card.
        pictures: PNG files for the card, by default the newest validation pictures beside the file.

    Returns:
        The address of the model's page.

    Raises:
        FileNotFoundError: the file or a picture does not exist.
        ValueError: the file is damaged, or the name is not one that you may push to; nothing was pushed.
        OSError: the hub cannot be reached, or refuses.

    Example:
        push_concept("teddy/concept.safetensors", "someone/teddy", license="cc-by-4.0")
    """
    if isinstance(pictures, str):
        raise ValueError(
            f"`pictures` must be a list of files, got the text {pictures!r}. Put it into a list."
        )
    file = concept_path(path)
    concept = Concept.load(file)
    shown = [_picture(picture) for picture in pictures or _validation_pictures(file)]
    places = [f"pictures/{number}.png" for number in range(1, len(shown) + 1)]
    captions = [caption for caption, _ in shown]
    card = model_card(
        concept, file, name=name, license=license, pictures=list(zip(places, captions, strict=True))
    )
    contents = {RUN_FILE: file.read_bytes(), CARD: card.encode()}
    contents |= {place: data for place, (_, data) in zip(places, shown, strict=True)}
    if figures_of(concept, file) and file.with_name(FIGURES_FILE).is_file():
        contents[FIGURES_FILE] = file.with_name(FIGURES_FILE).read_bytes()
    check_can_push(name)
    hub = required("huggingface_hub")
    operations = [hub.CommitOperationAdd(place, data) for place, data in contents.items()]
    with _explained(name), quiet():
        address = api().create_repo(name, private=private or None, exist_ok=True)
        api().create_commit(name, operations, commit_message=f"Push {concept.token}")
    return str(address)


def check_can_push(name: str) -> None:
    """Check that the hub can be reached, knows the token, and that the name is one of the token's owner.

    Raises:
        ValueError: the name is not of the form "user/name", or under somebody else's name.
        OSError: the hub cannot be reached, or there is no valid token.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII):
        raise ValueError(f'A name on the hub must be of the form "user/name", got {name!r}.')
    with _explained(name), quiet():
        required("huggingface_hub.utils").validate_repo_id(name)
        who = api().whoami()
    owners = [who.get("name"), *(each.get("name") for each in who.get("orgs") or ())]
    if who.get("type") == "user" and name.partition("/")[0] not in owners:
        raise ValueError(
            f"A name to push to must be under one of {', '.join(map(str, owners))}, whose token is used, got "
            f"{name!r}. Choose such a name, or log in as somebody else by `hf auth login`."
        )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn errors of pushing into errors of one line that say what helps."""
    errors = required("huggingface_hub.errors")
    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise OSError(
            f"Nothing can be pushed to {name} without a token for the hub. Log in by `hf auth login`, or set "
            "HF_TOKEN."
        ) from error
    except errors.HFValidationError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{name!r} cannot be a name on the hub: {text} Choose another.") from error
    except Exception as error:  # of whichever network library the hub's client uses, in this version
        raise OSError(f"Nothing was pushed to {name}, because the model hub {reason(error)}.") from error


def _validation_pictures(file: Path) -> list[Path]:
    """Return the newest validation pictures beside a concept's file."""
    found = [path for path in file.parent.glob("validation-*.png") if path.stem.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]))[-1:]


def _picture(path: str | os.PathLike[str]) -> tuple[str, bytes]:
    """Return what a picture shows, in words, and its bytes.

    Raises:
        ValueError: it is not a PNG file.
    """
    data = bytes_of(Path(path), "picture")
    if not data.startswith(PNG):
        raise ValueError(f"A picture of a model card must be a PNG file, got {path}. Convert it.")
    try:
        facts: dict[str, Any] = read_picture_facts(path)
    except ValueError:  # of another program
        return Path(path).stem, data
    prompts = facts.get("rows") or [each["prompt"] for each in facts.get("columns", ())]
    return "; ".join(map(str, prompts)) or str(facts.get("prompt", Path(path).stem)), data
