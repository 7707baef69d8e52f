"""The evidence's harness on an untrained model: cells, views and tables, and how figures are averaged."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "world"))
sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "evidence"))

import report
import run
import world
from cells import Cell, covariance_of, run_cell
from claims import claims_table, verdict
from contenders import contender, parts
from diffusers import AutoencoderKL
from evaluate import load_pipeline
from figures import by_object, difference, of_view, read_cells
from methods import METHODS, TOKEN, keys_locked, perfusion_views
from PIL import Image
from sheets import cached, cut, lay_out
from task import objects
from transformers import CLIPTextModel, CLIPTokenizer
from unet_stage import make_pipeline, make_unet

from perfusion_pytorch import load_concept
from perfusion_pytorch.layers.loaded import LoadedProjection

COMMITTED = Path(world.__file__).parent / "tiny-sd"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The world's text encoder and autoencoder, with a small untrained UNet."""
    folder = tmp_path_factory.mktemp("model")
    encoder = CLIPTextModel.from_pretrained(COMMITTED / "text_encoder")
    vae = AutoencoderKL.from_pretrained(COMMITTED / "vae")
    unet = make_unet(vae.config.latent_channels, 16, (16, 32, 32), encoder.config.hidden_size).eval()
    pipe = make_pipeline(CLIPTokenizer.from_pretrained(COMMITTED / "tokenizer"), encoder, vae, unet)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    """Cells of all contenders of the first part, of two steps and five prompts; the first two have views."""
    folder = tmp_path_factory.mktemp("results")
    covariance_of(model, folder)
    for who in parts()["main"]:
        views = 1 if who.name in ("perfusion", "LoRA, rank 1") else 0
        run_cell(Cell(who, objects("test", 1)[0], 0, 2, 5, views, model, folder))
    torch.set_num_threads(1)
    return folder


def test_objects_of_the_two_splits_are_different_and_of_all_superclasses():
    test, development = objects("test", 2), objects("development", 2)
    assert len(test) == 2 * len(world.SUPERCLASSES) and {s.superclass for s in test} == set(
        world.SUPERCLASSES
    )
    assert min(s.seed for s in test) >= 1000 > max(s.seed for s in development)


def test_every_contender_has_a_method_and_a_name_of_its_own():
    everyone = [who for group in parts().values() for who in group]
    assert {who.method for who in everyone} == METHODS.keys()
    assert len({who.name for who in everyone}) == len(everyone)


def test_a_cell_says_what_was_measured_and_shows_it(results):
    groups = read_cells(results)
    assert list(groups) == sorted(groups, key=lambda name: groups[name][0]["stem"]) and len(groups) == len(
        METHODS
    )
    ours = groups["perfusion"][0]
    assert ours["figures"]["plain"]["changed"] == ours["figures"]["unrelated"]["changed"] == 0
    assert groups["Custom Diffusion"][0]["figures"]["plain"]["changed"] > 0
    numbers = {name: records[0]["trained numbers"] for name, records in groups.items()}
    assert (
        numbers["textual inversion"]
        < numbers["perfusion"]
        < numbers["LoRA, rank 4"]
        < numbers["Custom Diffusion"]
    )
    assert {"default", "β 0", "τ 0.15", "keys locked by 0", "global lock"} <= ours["views"].keys()
    assert len(cut(Image.open(results / f"{ours['stem']}.png"), 5)) == 5
    assert len(list((results / "base").glob("*.png"))) == 2


def test_views_change_what_they_say_and_leave_it_as_it_was(results, model):
    """Keys locked by 0 are the embedding's own, by 1 the lock's; other gates end with their block."""
    pipe = load_pipeline(model)
    (path,) = results.glob("trained/perfusion-*/concept.safetensors")
    load_concept(pipe, path)
    layers = [m for m in pipe.unet.modules() if isinstance(m, LoadedProjection)]
    key, value = (next(m for m in layers if m.is_key_proj is is_key) for is_key in (True, False))

    def made():
        encoded, _ = pipe.encode_prompt(f"a {TOKEN} on red", "cpu", 1, False)
        return encoded, key(encoded), value(encoded)

    encoded, locked, edited = made()
    free, shut = (torch.nn.functional.linear(encoded, layer.weight) for layer in (key, value))
    assert not torch.allclose(locked, free, atol=1e-3) and not torch.allclose(edited, shut, atol=1e-4)
    for share in (0.0, 0.5, 1.0):
        with keys_locked(pipe, share):
            assert torch.allclose(made()[1], free + share * (locked - free), atol=1e-5)
    views = perfusion_views(pipe)
    for name, expected in (("β 1.5", shut), ("β 0.5", edited)):
        with views[name]():
            assert torch.allclose(made()[2], expected, atol=1e-5)
    for again, before in zip(made(), (encoded, locked, edited), strict=True):
        assert torch.equal(again, before)


def test_a_cell_that_is_there_is_not_run_again(results, model, monkeypatch):
    cell = Cell(contender("perfusion"), objects("test", 1)[0], 0, 2, 5, 1, model, results)
    before = cell.path.stat().st_mtime_ns
    run.run_all([cell], 1)
    assert cell.path.stat().st_mtime_ns == before
    assert replace(cell, steps=3).path != cell.path and replace(cell, seed=1).path != cell.path


def test_the_report_is_drawn(results, tmp_path, capsys):
    report.main(["--results_dir", str(results), "--output_dir", str(tmp_path)])
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {"table.md", "views.md", "claims.md", "mix.md", "pareto.png", "grid.png"}
    assert len((tmp_path / "table.md").read_text().splitlines()) == 2 + len(METHODS)
    assert (
        "keys locked by 0" in (tmp_path / "views.md").read_text()
        and "Perfusion" not in capsys.readouterr().err
    )


def test_steps_of_equal_time(monkeypatch):
    seconds = {"perfusion": [10.0, 0.2], "LoRA, rank 1": [2.0, 0.4]}
    monkeypatch.setattr(run, "pace", lambda args, method: seconds[method])
    assert run.steps_in_time(run.parse(["--steps", "500"]), "LoRA, rank 1") == (10 + 500 * 0.2 - 2) / 0.4


def record(name, number, seed, both, **views):
    figures = {"both": both, "identity": both, "followed": both}
    return {
        "name": name,
        "superclass": "bear",
        "object": number,
        "seed": seed,
        "figures": figures,
        "views": views,
    }


def test_figures_are_means_over_seeds_and_differences_over_objects():
    ours = by_object(
        [record("a", 1, 0, 0.5), record("a", 1, 1, 0.7), record("a", 2, 0, 1.0)], of_view(None, "both")
    )
    theirs = by_object(
        [record("b", 1, 0, 0.4), record("b", 2, 0, 0.4), record("b", 3, 0, 0.4)], of_view(None, "both")
    )
    assert ours == {("bear", 1): pytest.approx(0.6), ("bear", 2): 1.0}
    mean, (low, high), count = difference(ours, theirs)
    assert (
        (mean, count) == (pytest.approx(0.4), 2) and low == pytest.approx(0.2) and high == pytest.approx(0.6)
    )


def test_claims_hold_where_the_interval_says_so():
    assert [verdict(*interval) for interval in ((0.1, 0.2, 1), (0.1, 0.2, -1), (-0.1, 0.2, 1))] == [
        "holds",
        "the opposite holds",
        "not shown",
    ]
    locked, free = "default", "keys locked by 0"
    records = [
        record("perfusion", i, 0, 0.9, **{locked: {"followed": 0.9 + i / 100}, free: {"followed": 0.5}})
        for i in range(4)
    ]
    line = claims_table({"perfusion": records}).splitlines()[2]
    assert "locked keys follow" in line and "+0.415" in line and "| 4 | holds |" in line


def test_cells_of_two_settings_are_not_mixed_up(tmp_path):
    for steps in (1, 2):
        one = record("perfusion", 1, 0, 0.5) | {"settings": {"steps": steps}}
        (tmp_path / f"a-{steps}.json").write_text(json.dumps(one))
    with pytest.raises(ValueError, match="must be of one setting"):
        read_cells(tmp_path)


def test_pictures_are_cut_from_their_sheet_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(13)]
    for again in (cut(lay_out(images), 13), cached(tmp_path / "a.png", lambda: images, 13)):
        assert [image.tobytes() for image in again] == [image.tobytes() for image in images]
    assert cached(tmp_path / "a.png", None, 13)[12].tobytes() == images[12].tobytes()
