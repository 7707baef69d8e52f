"""The results of `bench_gpu.py` as the Markdown tables of `docs/benchmarks.md`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gpu.pictures import BASE
from gpu.training import EMBEDDING, FROZEN, OUTPUTS, STEPS

NOTHING = "–"
Cells = Mapping[str, Mapping[str, Any]]
Entry = Mapping[str, Any]  # what was found of a contender in a cell


def markdown(result: Mapping[str, Any]) -> str:
    """Return all tables of a result, with the card's name, and below them what was not measured."""
    cells: Cells = result["cells"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    memory = result.get("memory of the device, bytes")
    size = f", {gigabytes(memory)} GB" if memory else ""
    sections = (_pictures, _training, _concept, _others, _missing)
    blocks = [block for section in sections for block in section(cells)]
    return "\n\n".join([f"{result['device']}{size}. {versions}.", *blocks]) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gigabytes(count: float | None) -> str:
    return NOTHING if count is None else f"{count / 1e9:.1f}"


def times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _of_kind(cells: Cells, word: str) -> dict[str, Entry]:
    """Return the measured cells whose name begins with a word, by the rest of the name."""
    return {
        name.removeprefix(f"{word}: "): cell
        for name, cell in cells.items()
        if name.startswith(f"{word}: ") and "contenders" in cell
    }


def _grid(cells: Cells, text_of: Callable[[str, Entry], str], more: Mapping[str, str] | None = None) -> str:
    """Return a table with a row for each cell and a column for each contender.

    Args:
        cells: by the label of their row.
        text_of: what a contender's entry says, given its name. One that failed, or is not in a cell, says so.
        more: a further column: a cell's key, and the head. It holds bytes.
    """
    names = list(dict.fromkeys(name for cell in cells.values() for name in cell["contenders"]))
    further = more or {}

    def text(name: str, entry: Entry | None) -> str:
        if entry is None:
            return NOTHING
        if "error" not in entry:
            return text_of(name, entry)
        return "out of memory" if "out of memory" in entry["error"].lower() else "failed"

    rows = [
        [
            label,
            *(text(name, cell["contenders"].get(name)) for name in names),
            *(gigabytes(cell.get(key)) for key in further),
        ]
        for label, cell in cells.items()
    ]
    return table(["", *names, *further.values()], rows)


def _pictures(cells: Cells) -> Iterator[str]:
    found = _of_kind(cells, "pictures")
    if not found:
        return

    def text(name: str, entry: Entry) -> str:
        if name == BASE:
            return " + ".join(f"{part:.3f}" for part in entry["seconds"].values()) + " s"
        whole, denoising = (times(entry[f"{part} over the base's"]) for part in ("picture", "denoising"))
        return f"{whole} ({denoising})"

    yield (
        "A picture: seconds of the prompt, of denoising and of decoding without a concept, then the time "
        "over that; in brackets the time of denoising alone over the base's."
    )
    yield _grid(found, text)
    yield "Peak memory of denoising and of decoding in GB, with the weights."
    key = "peak memory of denoising, bytes"
    yield _grid(found, lambda _, entry: gigabytes(entry[key]), {"peak memory of decoding, bytes": "decoding"})


def _training(cells: Cells) -> Iterator[str]:
    found = _of_kind(cells, "training")
    if not found:
        return

    def text(name: str, entry: Entry) -> str:
        if name == FROZEN:
            return f"{entry['milliseconds']:.1f} ms"
        return times(entry["step over the frozen model's"])

    yield "A training step: milliseconds of the frozen model's own, then the time over that."
    yield _grid(found, text)
    yield "Peak memory of a training step in GB, with the weights."
    yield _grid(found, lambda _, entry: gigabytes(entry["peak memory, bytes"]))


def _concept(cells: Cells) -> Iterator[str]:
    """Yield how long a concept takes with the default settings: half the steps for each of two phases."""
    rows = []
    for label, cell in _of_kind(cells, "training").items():
        phases = [cell["contenders"].get(name, {}) for name in (EMBEDDING, OUTPUTS)]
        if all("milliseconds" in phase for phase in phases):
            minutes = STEPS / 2 * sum(phase["milliseconds"] for phase in phases) / 60_000
            peaks = [phase["peak memory, bytes"] for phase in phases]
            rows.append([label, f"{minutes:.1f}", gigabytes(None if None in peaks else max(peaks))])
    if rows:
        yield f"A concept: {STEPS} steps, half of them for each phase, without the covariance."
        yield table(["", "minutes", "peak memory, GB"], rows)


def _others(cells: Cells) -> Iterator[str]:
    rows = []
    for name, cell in cells.items():
        if "captions a second" in cell:
            count, minutes = cell["captions a second"], cell["minutes of 100,000 captions"]
            rows.append([name, f"{count:,.0f} captions a second, {minutes:.1f} minutes for 100,000"])
        for contender, line in cell.get("waits", {}).items():
            rows.append([f"{name}, {contender}", line])
        if "loading, milliseconds each" in cell:
            ends = ", ".join(f"{end} {ms:.1f}" for end, ms in cell["loading, milliseconds each"].items())
            deleting = cell["deleting one of them, milliseconds"]
            rows.append([name, f"loading: {ends} ms each; deleting one: {deleting:.1f} ms"])
    if rows:
        yield "The covariance, waits of a denoiser call for the GPU, and loading."
        yield table(["", "found"], rows)


def _missing(cells: Cells) -> Iterator[str]:
    lines = []
    for name, cell in cells.items():
        lines += [f"- {name}: {cell[what]}" for what in ("skipped", "error") if what in cell]
        for contender, entry in cell.get("contenders", {}).items():
            if "error" in entry:
                lines.append(f"- {name}, {contender}: {entry['error']}")
    if lines:
        yield "Not measured:"
        yield "\n".join(lines)
