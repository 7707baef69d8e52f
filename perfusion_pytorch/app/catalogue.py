"""The concept files that the page offers, by names: a page names no paths."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perfusion_pytorch.app.run_kinds import TRAINING
from perfusion_pytorch.app.runs import Runs
from perfusion_pytorch.concept import Concept
from perfusion_pytorch.concept_file import RUN_FILE, concept_path


@dataclass(frozen=True)
class Offer:
    """A concept file that can be chosen.

    Attributes:
        path: the file.
        token, superclass: what it says of itself.
        beta, temperature: the gate that it recommends.
    """

    path: Path
    token: str
    superclass: str
    beta: float
    temperature: float

    @property
    def gate(self) -> tuple[float, float]:
        """β and τ."""
        return self.beta, self.temperature

    @classmethod
    def of(cls, path: Path) -> "Offer":
        """Read a concept file.

        Raises:
            FileNotFoundError, ValueError: it is not a whole concept file.
        """
        concept = Concept.load(path)
        return cls(path, concept.token, concept.superclass, *concept.eval_gate)


@dataclass(frozen=True, eq=False)
class Catalogue:
    """What all tabs may choose from.

    Attributes:
        files: those that the command line names, or that come with the model.
        runs: whose finished concepts are offered too.
    """

    files: tuple[Offer, ...]
    runs: Runs

    def offers(self, uploads: Mapping[str, Offer] | None = None) -> dict[str, Offer]:
        """Return what a tab offers, by name.

        Args:
            uploads: the tab's own.
        """
        named: dict[str, Offer] = {}
        for offer in self.files:
            named[_free(f"{offer.token}  {offer.path.name}", named)] = offer
        for run in self.runs.names(TRAINING):
            path = self.runs.folder / run / RUN_FILE
            if path.exists() and not self.runs.is_running(run):
                offer = Offer.of(path)
                named[_free(run_label(offer.token, run), named)] = offer
        return named | dict(uploads or {})

    def chosen(self, labels: Sequence[str], uploads: Mapping[str, Offer] | None) -> list[Offer]:
        """Return the concepts of some labels.

        Raises:
            ValueError: one is not offered.
        """
        offers = self.offers(uploads)
        unknown = [label for label in labels if label not in offers]
        if unknown:
            raise ValueError(f"The concept {unknown[0]!r} is not offered. Reload the page.")
        return [offers[label] for label in labels]

    def run_of(self, path: Path) -> str | None:
        """Return the training run of the page that a concept file is from; None if it is from elsewhere."""
        found = [run for run in self.runs.names(TRAINING) if self.runs.folder / run / RUN_FILE == path]
        return found[0] if found else None


def concepts_in(paths: Iterable[Path]) -> tuple[Offer, ...]:
    """Read the concept files that a command line names: files, runs' folders, or folders of files.

    Raises:
        FileNotFoundError, ValueError: one does not exist, or is not a concept file.
    """
    found = []
    for path in paths:
        is_folder_of_files = path.is_dir() and not (path / RUN_FILE).exists()
        several = sorted(path.glob("*.safetensors")) if is_folder_of_files else []
        found += several or [concept_path(path)]
    return tuple(Offer.of(path) for path in dict.fromkeys(found))


def run_label(token: str, run: str) -> str:
    """Return the name that a run's concept is offered under."""
    return f"{token}  trained in {run}"


def upload_label(offer: Offer, taken: Iterable[str]) -> str:
    """Return the name that an uploaded concept is offered under, in its tab alone."""
    return _free(f"{offer.token}  uploaded {offer.path.name}", taken)


def _free(name: str, taken: Iterable[str]) -> str:
    """Return a name, with a number where it is taken."""
    taken, number, free = set(taken), 1, name
    while free in taken:
        number += 1
        free = f"{name} ({number})"
    return free
