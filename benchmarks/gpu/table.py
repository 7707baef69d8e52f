"""The results of `bench_gpu.py` as the Markdown tables of `docs/benchmarks.md`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gpu.pictures import BASE
from gpu.training import EMBEDDING, OUTPUTS, STEPS

NOTHING = "–"
Cells = Mapping[str, Mapping[str, Any]]


def markdown(result: Mapping[str, Any]) -> str:
    """Return all tables of a result, with the card's name, and below them what was not measured."""
    cells: Cells = result["cells"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    memory = result.get("memory of the device, bytes")
    size = f", {gigabytes(memory)} GB" if memory else ""
    blocks = [
        f"{result['device']}{size}. {versions}.",
        *_pictures(cells),
        *_training(cells),
        *_concept(cells),
        *_others(cells),
        *_missing(cells),
    ]
    return "\n\n".join(blocks) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def gigabytes(count: float | None) -> str:
    return NOTHING if count is None else f"{count / 1e9:.1f}"


def short(entry: Mapping[str, Any] | None, text: Callable[[Mapping[str, Any]], str]) -> str:
    """Return a contender's entry in a table: a text made of it, or that it failed, or that it is missing."""
    if entry is None:
        return NOTHING
    if "error" not in entry:
        return text(entry)
    return "out of memory" if "out of memory" in entry["error"] else "failed"


def times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _of_kind(cells: Cells, word: str) -> dict[str, Mapping[str, Any]]:
    """Return the measured cells whose name begins with a word, by the rest of the name."""
    return {
        name.removeprefix(f"{word}: "): cell
        for name, cell in cells.items()
        if name.startswith(f"{word}: ") and "contenders" in cell
    }


def _names(cells: Cells) -> list[str]:
    """Return the contenders of cells, each once, in their order."""
    return list(dict.fromkeys(name for cell in cells.values() for name in cell["contenders"]))


def _pictures(cells: Cells) -> Iterator[str]:
    found = _of_kind(cells, "pictures")
    if not found:
        return

    def seconds(entry: Mapping[str, Any]) -> str:
        return " + ".join(f"{part:.3f}" for part in entry["seconds"].values())

    yield (
        "A picture: seconds of prompt, denoising and decoding without a concept, then the time over that, "
        "and in brackets that of denoising alone."
    )
    rows = []
    for name in _names(found):
        row = [f"{name}, seconds" if name == BASE else name]
        for cell in found.values():
            entry = cell["contenders"].get(name)
            if name == BASE:
                row.append(short(entry, seconds))
            else:
                row.append(
                    short(
                        entry,
                        lambda e: (
                            f"{times(e['picture over the base' + chr(39) + 's'])} "
                            f"({times(e['denoising over the base' + chr(39) + 's'])})"
                        ),
                    )
                )
        rows.append(row)
    yield table(["", *found], rows)
    yield "Peak memory in GB, weights included: of denoising, and in the last row of decoding."
    rows = [
        [
            name,
            *(
                short(
                    cell["contenders"].get(name), lambda e: gigabytes(e["peak memory of denoising, bytes"])
                )
                for cell in found.values()
            ),
        ]
        for name in _names(found)
    ]
    rows.append(["decoding", *(gigabytes(cell["peak memory of decoding, bytes"]) for cell in found.values())])
    yield table(["", *found], rows)


def _training(cells: Cells) -> Iterator[str]:
    found = _of_kind(cells, "training")
    if not found:
        return
    names = _names(found)
    first, *others = names
    yield "A training step: the frozen model's milliseconds, then the time over that."
    rows = [
        [
            label,
            short(cell["contenders"].get(first), lambda e: f"{e['milliseconds']:.1f}"),
            *(
                short(cell["contenders"].get(name), lambda e: times(e["step over the frozen model's"]))
                for name in others
            ),
        ]
        for label, cell in found.items()
    ]
    yield table(["", f"{first}, ms", *others], rows)
    yield "Peak memory of a training step in GB, weights included."
    rows = [
        [
            label,
            *(
                short(cell["contenders"].get(name), lambda e: gigabytes(e["peak memory, bytes"]))
                for name in names
            ),
        ]
        for label, cell in found.items()
    ]
    yield table(["", *names], rows)


def _concept(cells: Cells) -> Iterator[str]:
    """Yield how long a concept takes with the default settings: half the steps for each of two phases."""
    rows = []
    for label, cell in _of_kind(cells, "training").items():
        phases = [cell["contenders"].get(name, {}).get("milliseconds") for name in (EMBEDDING, OUTPUTS)]
        peaks = [cell["contenders"].get(name, {}).get("peak memory, bytes") for name in (EMBEDDING, OUTPUTS)]
        if None in phases:
            continue
        minutes = STEPS * sum(phases) / 2 / 1000 / 60
        memory = None if None in peaks else max(peaks)
        rows.append([label, f"{minutes:.1f}", gigabytes(memory)])
    if rows:
        yield f"A concept: {STEPS} steps of so many rows, half of them for each phase."
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
            rows.append([f"{name}, loading", f"{ends} ms each; deleting one {deleting:.1f} ms"])
    if rows:
        yield table(["", "found"], rows)


def _missing(cells: Cells) -> Iterator[str]:
    lines = []
    for name, cell in cells.items():
        for what in ("skipped", "error"):
            if what in cell:
                lines.append(f"- {name}: {cell[what]}")
        for contender, entry in cell.get("contenders", {}).items():
            if "error" in entry:
                lines.append(f"- {name}, {contender}: {entry['error']}")
    if lines:
        yield "Not measured:"
        yield "\n".join(lines)
