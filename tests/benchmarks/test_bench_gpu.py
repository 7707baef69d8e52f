"""The whole of `benchmarks/bench_gpu.py` with tiny models on the CPU."""

import json
import math

import bench_gpu
import pytest
import torch
from diffusers.utils import logging

PARTS = ["encoding", "denoising", "decoding"]
STEPS = [
    "frozen model",
    "train_concept, outputs",
    "train_concept, embedding",
    "textual inversion",
    "LoRA, rank 4",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run wrote, what it printed, and the file."""
    path, verbosity = tmp_path_factory.mktemp("gpu") / "result.json", logging.get_verbosity()
    with pytest.MonkeyPatch.context() as patch:
        written = []
        patch.setattr(bench_gpu.sys.stdout, "write", written.append)
        bench_gpu.main(["--small", "--output", str(path)])
    logging.set_verbosity(verbosity)
    return json.loads(path.read_text()), "".join(written), path


def entries(result):
    return {
        (name, contender): entry
        for name, cell in result["cells"].items()
        for contender, entry in cell.get("contenders", {}).items()
    }


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="names what needs a GPU")
def test_all_cells_are_measured_but_those_that_need_a_gpu(run):
    result, *_ = run
    failed = {name: cell["error"] for name, cell in result["cells"].items() if "error" in cell}
    assert failed == {
        "waits: SD 1.5, bf16": "RuntimeError: whether calls wait for the GPU shows on a GPU only",
        "training: SD 1.5, fp16, batch 2": (
            "ValueError: `mixed_precision` must be 'no' or 'bf16' on a CPU, got 'fp16'. Choose one of these, "
            "for a pipeline in bfloat16 or float32."
        ),
    }
    assert not [name for name, cell in result["cells"].items() if "skipped" in cell]
    assert not {name: entry["error"] for name, entry in entries(result).items() if "error" in entry}
    assert list(result["cells"]) == [
        "pictures: SD 1.5, bf16",
        "waits: SD 1.5, bf16",
        "pictures: SD 1.5, bf16, many loaded",
        *(f"training: SD 1.5, bf16, batch {n}{kind}" for kind in ("", ", checkpointing") for n in (1, 2)),
        "covariance: SD 1.5, bf16",
        "pictures: SD 1.5, bf16, compiled blocks",
        "pictures: SDXL, bf16",
        "training: SDXL, bf16, batch 2",
        "covariance: SDXL, bf16",
        "pictures: SD 1.5, fp16",
        "training: SD 1.5, fp16, batch 2",
    ]


@pytest.mark.slow
def test_pictures_are_compared_with_the_base_in_their_parts(run):
    result, *_ = run
    for name in ("pictures: SD 1.5, bf16", "pictures: SDXL, bf16"):
        cell = result["cells"][name]
        assert list(cell["contenders"]) == bench_gpu.NAMES and cell["rounds"] == 2
        base = cell["contenders"]["no concept"]
        assert base["picture over the base's"] == base["denoising over the base's"] == 1
        for entry in cell["contenders"].values():
            assert list(entry["seconds"]) == PARTS and min(entry["seconds"].values()) > 0
            assert entry["seconds"]["decoding"] == base["seconds"]["decoding"]
            assert 0.05 < entry["denoising over the base's"] < 20
    many = result["cells"]["pictures: SD 1.5, bf16, many loaded"]
    assert list(many["contenders"]) == ["no concept", "1 concept", "1 concept of 20 loaded"]
    assert many["loading, milliseconds each"].keys() == {"first ten", "last ten"}


@pytest.mark.slow
def test_compiled_blocks_have_no_graph_break(run):
    cell = run[0]["cells"]["pictures: SD 1.5, bf16, compiled blocks"]
    assert list(cell["contenders"]) == bench_gpu.FEW
    assert cell["compiled"] == "repeated blocks" and cell["graph breaks"] == 0


@pytest.mark.slow
def test_steps_are_compared_with_the_frozen_models(run):
    result, *_ = run
    cells = {name: cell for name, cell in result["cells"].items() if "rows" in cell}
    assert [cell["rows"] for cell in cells.values()] == [1, 2, 1, 2, 2]
    assert [cell["gradient checkpointing"] for cell in cells.values()] == [False, False, True, True, False]
    for cell in cells.values():
        assert list(cell["contenders"]) == STEPS
        assert cell["contenders"]["frozen model"]["step over the frozen model's"] == 1
        for entry in cell["contenders"].values():
            assert 0.05 < entry["step over the frozen model's"] < 20 and entry["milliseconds"] > 0


@pytest.mark.slow
def test_captions_a_second_and_minutes_are_of_one_rate(run):
    cell = run[0]["cells"]["covariance: SD 1.5, bf16"]
    seconds = 60 * cell["minutes of 100,000 captions"]
    assert math.isclose(cell["captions a second"] * seconds, 100_000)


@pytest.mark.slow
def test_it_prints_the_tables_of_its_file(run, capsys):
    result, printed, path = run
    capsys.readouterr()
    bench_gpu.main(["--table", "--output", str(path)])
    tables = capsys.readouterr().out
    assert printed.endswith(tables)
    for name in result["cells"]:
        assert name.split(": ", 1)[1] in tables


def test_what_does_not_fit_into_the_budget_is_skipped_and_said(tmp_path, capsys):
    bench_gpu.main(["--small", "--minutes", "0", "--output", str(tmp_path / "result.json")])
    cells = json.loads((tmp_path / "result.json").read_text())["cells"]
    assert all(cell["skipped"].endswith("s, and 0 s were left") for cell in cells.values())
    assert "- few training: SDXL, bf16: it needs about 10 s, and 0 s were left" in capsys.readouterr().out


def test_without_a_gpu_it_asks_for_small_models(monkeypatch, capsys):
    monkeypatch.setattr(bench_gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench_gpu.main([])
    assert "This needs a CUDA GPU. `--small` shows on a CPU that it works." in capsys.readouterr().err


@pytest.mark.parametrize("size", [bench_gpu.REAL, bench_gpu.SMALL], ids=["real", "small"])
def test_every_cell_of_a_plan_has_an_expected_time(size):
    for model, _, kinds in size.plan:
        rows = [f"batch {n}" for n in size.rows] if {"training", "few training"} & {*kinds} else []
        for kind in (*kinds, *rows):
            assert size.seconds[model][kind.replace("few training", "training")] > 0


def test_the_real_plan_holds_all_models_dtypes_and_ways():
    seen = {(model, dtype, kind) for model, dtype, kinds in bench_gpu.REAL.plan for kind in kinds}
    for model in ("SD 1.5", "SDXL"):
        assert {("pictures"), ("many"), ("training"), ("covariance"), ("compiled"), ("waits")} <= {
            kind for m, dtype, kind in seen if (m, dtype) == (model, "bf16")
        }
        assert {"few pictures", "few training", "compiled"} <= {
            kind for m, dtype, kind in seen if (m, dtype) == (model, "fp16")
        }
    assert bench_gpu.REAL.rows == (1, 4, 16) and bench_gpu.REAL.many == 1000
