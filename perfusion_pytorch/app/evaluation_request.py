"""What the page asks of an evaluation: checked before it starts, and as flags of `perfusion evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from perfusion_pytorch.app.catalogue import Offer
from perfusion_pytorch.app.run_kinds import EVALUATION
from perfusion_pytorch.app.runs import PICTURES
from perfusion_pytorch.app.shared import Page
from perfusion_pytorch.app.studio import MOST_BETAS, MOST_SEEDS, MOST_STEPS
from perfusion_pytorch.app.uploads import PEFT_CONFIG, PEFT_WEIGHTS, stage_files, stage_pictures
from perfusion_pytorch.evaluation.candidates import (
    LORA,
    Candidate,
    candidate_of,
    candidates_of,
    superclass_of,
)
from perfusion_pytorch.evaluation.loading import PEFT_PREFIX
from perfusion_pytorch.evaluation.pictures import Plan
from perfusion_pytorch.evaluation.prompts import BUILT_IN, prompts_for
from perfusion_pytorch.hub import check_is_available
from perfusion_pytorch.pipelines.model_notes import notes_of
from perfusion_pytorch.training.picture_files import SUFFIXES

FILES = "files"  # a run's uploaded weights
PROMPTS = "prompts.txt"  # those that were written on the page
CLIP, DINO, CHECKER = "clip", "dino", "checker"  # the judges
EXAMPLES, TEMPLATES, OWN = "examples", "templates", "own"  # lists of prompts beside the built-in ones
MOST_CANDIDATES = 8
MOST_IMAGES = 8  # of each prompt
MOST_PROMPTS, MOST_LETTERS = 64, 300
MOST_STRENGTH = 5.0
MOST_MADE = 5000  # pictures of an evaluation


@dataclass(frozen=True, kw_only=True)
class EvaluationRequest:
    """An evaluation as the page describes it.

    Attributes:
        model: the base model's name.
        concepts: those that are chosen of what the page offers.
        files, pictures: where the server has put the uploads: weights, and training pictures.
        words: what stands for the thing in prompts of LoRAs: a line for all, or "file=words".
        superclass: what the thing is; empty where the concepts say it.
        prompts: which list.
        lines: the user's own prompts, where they are the list.
        judges: of `CLIP`, `DINO` and `CHECKER`.
        betas, scales, images, steps, guidance, seed: as `perfusion evaluate` has them.

    Raises:
        ValueError: a value is out of its range.
    """

    model: str
    concepts: Sequence[Offer]
    files: Sequence[str] = ()
    words: str = ""
    pictures: Sequence[str] = ()
    superclass: str = ""
    prompts: str = "objects"
    lines: str = ""
    judges: Sequence[str] = ()
    betas: Sequence[float] = ()
    scales: Sequence[float] = (1.0,)
    images: int = 1
    steps: int = 20
    guidance: float = 7.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.judges:
            raise ValueError("There must be a judge: choose one or more.")
        for name, values in (("β", self.betas), ("scales", self.scales)):
            in_range = all(0 <= value <= MOST_STRENGTH for value in values)
            if not in_range or not 1 <= len(set(values)) == len(values) <= MOST_BETAS:
                raise ValueError(
                    f"{name} must be 1 to {MOST_BETAS} different numbers from 0 to {MOST_STRENGTH:g}, got "
                    f"{' '.join(f'{value:g}' for value in values) or 'none'}."
                )
        for what, value, low, high in (
            ("number of files", len(self.concepts) + len(self.files), 1, MOST_CANDIDATES),
            ("number of pictures of each prompt", self.images, 1, MOST_IMAGES),
            ("number of steps", self.steps, 1, MOST_STEPS),
            ("guidance", self.guidance, 0, 50),
            ("seed", self.seed, 0, MOST_SEEDS),
        ):
            if not low <= value <= high:
                raise ValueError(f"The {what} must be from {low} to {high}, got {value}.")

    def flags(self) -> list[str]:
        """Return the flags that need no folder."""
        return [
            "--betas",
            *map(str, self.betas),
            "--scales",
            *map(str, self.scales),
            f"--num_images_per_prompt={self.images}",
            f"--num_inference_steps={self.steps}",
            f"--guidance_scale={self.guidance}",
            f"--seed={self.seed}",
        ]


def start(page: Page, request: EvaluationRequest) -> str:
    """Check an evaluation, start it, and return its run's name.

    Raises:
        ValueError: what the evaluation would refuse, or another run is going on.
        OSError: a judge is not in the hub's cache, and the hub does not give it.
    """
    if request.model not in page.models:
        raise ValueError(f"The model must be one of {page.models}, got {request.model!r}.")
    judges = _judge_flags(page, request)
    stem = request.concepts[0].token if request.concepts else Path(request.files[0]).stem
    with page.runs.new(stem, EVALUATION) as folder:
        candidates = _candidates(page, request, folder)
        superclass = request.superclass.strip() or superclass_of(candidates)
        stage_pictures(_pictures(page, request), [], folder / PICTURES)
        prompts = _prompts(page, request, folder)
        count = _count(request, candidates, prompts, superclass)
        facts = {
            "model": request.model,
            "steps": count,
            "files": [{"path": str(candidate.path), "words": candidate.words} for candidate in candidates],
        }
        flags = [*page.model_flags[request.model], *request.flags(), *judges, f"--superclass={superclass}"]
        flags.append(f"--prompts={prompts}")
        for candidate in candidates:
            flags.append(f"--concept={candidate.path}")
            if candidate.superclass is None:  # a concept says its own words
                flags.append(f"--words={candidate.path}={candidate.words}")
        page.runs.record(folder, facts, flags, EVALUATION)
    return folder.name


def _judge_flags(page: Page, request: EvaluationRequest) -> list[str]:
    flags = []
    for judge, name in ((CLIP, page.clip_model), (DINO, page.dino_model)):
        if judge in request.judges:
            try:
                check_is_available(name, filename="config.json")  # before a run that would end with it
            except OSError as error:
                raise OSError(f"{error} The page gets it as `perfusion app --{judge}_model`.") from error
        flags.append(f"--{judge}_model={name}" if judge in request.judges else f"--no_{judge}")
    if CHECKER in request.judges:
        if request.model not in page.examples:
            raise ValueError(f"{request.model} has no checker of its own. Choose another judge.")
        flags.append(f"--checker={page.examples[request.model].checker}")
    return flags


def _candidates(page: Page, request: EvaluationRequest, folder: Path) -> list[Candidate]:
    """Return what is evaluated; what was uploaded is copied into the run's folder, which outlives uploads."""
    paths = [offer.path.resolve() for offer in request.concepts]
    sent = [str(path) for path in paths if path.is_relative_to(page.folder.resolve())]
    staged = stage_files([*sent, *request.files], folder / FILES)
    kept = [path for path in paths if str(path) not in sent]
    candidates = candidates_of([*kept, *staged], words_of(request.words, staged))
    for candidate in candidates:
        if candidate.kind == LORA and not candidate.path.with_name(PEFT_CONFIG).exists():
            with safe_open(candidate.path, framework="pt") as file:
                if all(name.startswith(PEFT_PREFIX) for name in file.keys()):  # noqa: SIM118
                    raise ValueError(
                        f"{candidate.path.name} is a LoRA as peft writes it, whose scale is in "
                        f"{PEFT_CONFIG}. Add both, the LoRA as {PEFT_WEIGHTS}."
                    )
    return candidates


def words_of(text: str, files: Sequence[Path]) -> dict[str, str]:
    """Return what stands for the thing in prompts, by file.

    Args:
        text: a line of words, for all files that do not say theirs, or lines such as "file=words".
        files: the added files.

    Raises:
        ValueError: a line names another file, or has no words.
    """
    named: dict[str, str] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, equals, words = map(str.strip, line.rpartition("="))
        found = [path for path in files if name in (path.name, path.stem)] if equals else _wordless(files)
        if (equals and not found) or not words:
            raise ValueError(
                "Words must be given as 'words' or 'file=words' with the name of an added file, one of "
                f"{[path.name for path in files]}, got {line!r}."
            )
        named |= {str(path): words for path in found}
    return named


def _wordless(files: Sequence[Path]) -> list[Path]:
    """Return the files that do not say which words are theirs."""
    found = []
    for path in files:
        try:
            candidate_of(path, None)
        except ValueError:  # or it is damaged, which is said when it is read again
            found.append(path)
    return found


def known_pictures(page: Page, model: str, concepts: Sequence[Offer]) -> tuple[str, list[Path]]:
    """Return the pictures that the first concept was trained on, and in words which they are.

    Nothing is known of those that were trained elsewhere.
    """
    for offer in concepts[:1]:
        run, path = page.catalogue.run_of(offer.path), offer.path.resolve()
        folder = page.examples[model].pictures.get(path) if model in page.examples else None
        if run is not None:
            folder = page.runs.folder / run / PICTURES
        if folder is not None:
            pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
            return f"{len(pictures)} pictures that {offer.token} was trained on", pictures
    return "", []


def _pictures(page: Page, request: EvaluationRequest) -> list[str]:
    pictures = list(request.pictures)
    if not pictures:
        pictures = list(map(str, known_pictures(page, request.model, request.concepts)[1]))
    if not pictures:
        raise ValueError("The training pictures must be added, since the page does not know them.")
    return pictures


def templates_of(page: Page, model: str) -> tuple[str, ...]:
    """Return the prompts that a model's folder recommends; none where it says nothing."""
    with page.studio.pipeline(model) as pipe:
        return notes_of(pipe).templates or ()


def _prompts(page: Page, request: EvaluationRequest, folder: Path) -> str:
    """Return the list of prompts as the command takes it: a name, or a file."""
    if request.prompts in BUILT_IN:
        return request.prompts
    if request.prompts == EXAMPLES and request.model in page.examples:
        return str(page.examples[request.model].prompts)
    if request.prompts not in (OWN, TEMPLATES):
        raise ValueError(f"There is no list of prompts {request.prompts!r}. Reload the page.")
    is_own = request.prompts == OWN
    lines = request.lines.splitlines() if is_own else list(templates_of(page, request.model))
    lines = [line.strip() for line in lines if line.strip()]
    if not 1 <= len(lines) <= MOST_PROMPTS or max(map(len, lines)) > MOST_LETTERS:
        raise ValueError(
            f"There must be 1 to {MOST_PROMPTS} prompts of at most {MOST_LETTERS} letters, one a line, got "
            f"{len(lines)} with at most {max(map(len, lines), default=0)} letters."
        )
    path = folder / PROMPTS
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def _count(request: EvaluationRequest, candidates: Sequence[Candidate], prompts: str, superclass: str) -> int:
    """Return how many pictures there will be; a ValueError where they are too many."""
    texts = prompts_for(prompts, superclass)
    plan = Plan(Path(), texts, superclass, tuple(range(request.seed, request.seed + request.images)))
    strengths = {"beta": request.betas, "scale": request.scales, None: (None,)}
    groups = [plan.base_group()]
    groups += [plan.group(candidate, s) for candidate in candidates for s in strengths[candidate.knob]]
    count = sum(len(group.jobs) for group in groups)
    if count > MOST_MADE:
        raise ValueError(
            f"At most {MOST_MADE:,} pictures can be made, got {count:,}. Choose fewer β or prompts."
        )
    return count
