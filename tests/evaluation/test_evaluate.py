"""`evaluate_concepts`: figures against the pictures by hand, what is written, and going on after a stop."""

import json
import re
import shutil

import pytest
import torch
from helpers.tiny_judges import clip_of_pictures, clip_of_text, dino_of_pictures
from helpers.tiny_pipes import IMAGES, tiny_pipe
from PIL import Image

from perfusion_pytorch import Concept, evaluate_concepts, load_concept, set_concepts
from perfusion_pytorch.evaluation.candidates import candidates_of
from perfusion_pytorch.evaluation.figures import Figure, bootstrap_interval
from perfusion_pytorch.evaluation.result import StrengthFigures
from perfusion_pytorch.evaluation.run import with_recommendation

TEMPLATES = ["a {} on red", "a photo of a {}", "one {} on blue"]
PROMPTS = [*TEMPLATES, "a house", "a photo of a bear"]
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 3.0, "progress": False, "prompts": PROMPTS}
ALONE = {"clip_model": None, "dino_model": None}


def bright(pictures, prompts, concept):
    """A checker: likeness is red, and prompts are followed where it is dark."""
    means = [sum(image.convert("RGB").resize((1, 1)).getpixel((0, 0))) / 765 for image in pictures]
    reds = [image.convert("RGB").resize((1, 1)).getpixel((0, 0))[0] / 255 for image in pictures]
    return {"identity": reds, "prompt": [1 - mean for mean in means]}


def evaluated(pipe, files, folder, **options):
    return evaluate_concepts(pipe, files, IMAGES, output_dir=folder, **SETTINGS | ALONE | options)


def by_hand(pipe, prompts, seeds):
    return [
        pipe(
            prompt,
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=2,
            guidance_scale=3.0,
            height=16,
            width=16,
        ).images[0]
        for prompt in prompts
        for seed in seeds
    ]


def filled(words):
    return [template.format(words) for template in TEMPLATES]


@pytest.fixture(scope="module")
def made_by_hand(made):
    """Pictures of the base model and of the concept at two β, each of three prompts with two seeds."""
    pipe = tiny_pipe()
    pipe.set_progress_bar_config(disable=True)
    base = by_hand(pipe, filled("car"), (5, 6))
    rest = by_hand(pipe, PROMPTS[3:], (5,))
    name, found = load_concept(pipe, made / "mine.safetensors"), {}
    for beta in (0.2, 0.8):
        set_concepts(pipe, name, beta=beta)
        shown, plain = by_hand(pipe, filled(name), (5, 6)), by_hand(pipe, filled("car"), (5,))
        found[beta] = shown, plain, by_hand(pipe, PROMPTS[3:], (5,))
    return base, rest, found


@pytest.fixture(scope="module")
def measured(made, clip, dino, tmp_path_factory):
    """One evaluation with CLIP, DINO and a checker."""
    folder = tmp_path_factory.mktemp("evaluated") / "new" / "folder"
    options = {"betas": [0.2, 0.8], "seed": 5, "clip_model": clip, "dino_model": str(dino)}
    return evaluated(tiny_pipe(), made / "mine.safetensors", folder, checkers=[bright], **options)


def assert_figure(figure, values):
    """A figure is the mean of three prompts' means, with the interval over these."""
    means = [(values[i] + values[i + 1]) / 2 for i in (0, 2, 4)] if len(values) == 6 else values
    assert figure.mean == pytest.approx(sum(means) / len(means), abs=3e-6)
    assert (figure.low, figure.high) == pytest.approx(bootstrap_interval(means), abs=3e-6)


def test_the_figures_of_clip_and_dino_are_those_computed_by_hand(measured, made_by_hand, clip, dino):
    base, _, found = made_by_hand
    texts = [clip_of_text(clip, text) for text in filled("car") for _ in range(2)]
    rows = [(row.figures, found[row.strength][0]) for row in measured.files[0].strengths]
    for figures, pictures in [(measured.base, base), *rows]:
        for name, embed in (("CLIP image", clip_of_pictures), ("DINO", dino_of_pictures)):
            folder = clip if name == "CLIP image" else dino
            likeness = (embed(folder, pictures) @ embed(folder, IMAGES).T).mean(1).tolist()
            assert_figure(figures[name], likeness)
        aligned = [(p @ t).item() for p, t in zip(clip_of_pictures(clip, pictures), texts, strict=True)]
        assert_figure(figures["CLIP text"], aligned)
        own = bright(pictures, None, None)
        assert_figure(figures["identity"], own["identity"])
        assert_figure(figures["prompt"], own["prompt"])
    assert rows[0][0]["DINO"] != rows[1][0]["DINO"]


def test_the_ceiling_is_of_the_training_pictures_among_themselves(measured, clip, dino):
    for name, rows in (
        ("CLIP image", clip_of_pictures(clip, IMAGES)),
        ("DINO", dino_of_pictures(dino, IMAGES)),
    ):
        cosines = rows @ rows.T
        others = [(cosines[i].sum() - cosines[i, i]).item() / 2 for i in range(3)]
        assert measured.training[name].mean == pytest.approx(sum(others) / 3, abs=3e-6)
    assert measured.training["identity"].mean == pytest.approx(sum(bright(IMAGES, 0, 0)["identity"]) / 3)
    assert measured.training.keys() == {"CLIP image", "DINO", "identity"}


def test_the_changes_are_of_plain_and_unrelated_prompts_from_the_same_noise(measured, made_by_hand):
    base, rest, found = made_by_hand

    def change(one, other):
        a, b = (torch.tensor(list(image.tobytes())).double() for image in (one, other))
        return (a - b).abs().mean().item()

    for row in measured.files[0].strengths:
        _, plain, unrelated = found[row.strength]
        assert_figure(row.figures["plain change"], list(map(change, plain, base[::2])))
        assert_figure(row.figures["unrelated change"], list(map(change, unrelated, rest)))
        for name in ("plain change", "unrelated change"):  # a concept acts in its own prompts alone
            assert row.figures[name].mean == 0
    assert not {"plain change", "unrelated change"} & measured.base.keys()


def test_the_recommendation_follows_the_rule_on_the_checkers_figures(measured):
    (file,) = measured.files
    base = measured.base["prompt"].mean
    rows = [
        (row.strength, row.figures["identity"].mean, row.figures["prompt"].mean) for row in file.strengths
    ]
    enough = [row for row in rows if row[2] >= 0.95 * base]
    best = max(enough, key=lambda row: row[1]) if enough else max(rows, key=lambda row: row[2])
    assert (measured.identity, measured.prompt) == ("identity", "prompt")
    assert file.recommended == best[0] and file.is_enough == bool(enough)
    assert measured.summary is next(r for r in file.strengths if r.strength == best[0]).figures


def test_equally_good_strengths_are_named(made):
    """Those that keep the prompt figure, and whose likeness lies in the recommended one's interval."""
    (candidate,) = candidates_of([made / "mine.safetensors"], None)
    rows = tuple(
        StrengthFigures(beta, {"i": Figure(like, like - 0.1, like + 0.1), "p": Figure(prompt, 0, 1)})
        for beta, like, prompt in ((0.3, 0.75, 0.2), (0.5, 0.8, 0.9), (0.7, 0.71, 0.9), (0.9, 0.69, 0.9))
    )
    file = with_recommendation(candidate, rows, {"p": Figure(0.9, 0, 1)}, "i", "p")
    assert file.recommended == 0.5 and file.reason == (
        "of those that keep 95 % of the base model's p (at least 0.855), it has the highest i (0.800). "
        "β 0.7 may be as good: within its interval. More prompts would tell."
    )
    file = with_recommendation(candidate, rows, {"p": Figure(1.0, 0, 1)}, "i", "p")
    assert file.recommended == 0.9 and not file.is_enough and "none keeps 95 %" in file.reason


def test_the_json_has_the_summary_on_top_and_all_figures_below(measured):
    report = json.loads((measured.output_dir / "evaluation.json").read_bytes())
    assert report == measured.as_json() and report["recommended"] == measured.files[0].recommended
    assert report["summary"].keys() == report["meanings"].keys() == measured.summary.keys()
    for name, figure in measured.summary.items():
        assert report["summary"][name] == {"mean": figure.mean, "low": figure.low, "high": figure.high}
    (file,) = report["files"]
    assert (file["file"], file["kind"], file["words"], file["knob"]) == (
        "mine.safetensors",
        "Perfusion",
        "<car-1>",
        "beta",
    )
    assert [row["strength"] for row in file["strengths"]] == [0.2, 0.8]
    assert report["base_model"]["DINO"]["mean"] == measured.base["DINO"].mean
    assert "95 %" in report["rule"]["text"] and report["settings"]["num_inference_steps"] == 2
    assert str(measured.output_dir) not in json.dumps(report)


def test_the_table_says_it_in_words(measured):
    text = (measured.output_dir / "evaluation.txt").read_text()
    assert text == f"{measured}\n" and max(map(len, text.splitlines())) < 130
    assert "car: 3 prompts, 2 pictures of each; 3 training pictures." in text
    head = next(line for line in text.splitlines() if "DINO" in line)
    assert re.split(r" {2,}", head.strip()) == [
        "DINO", "CLIP image", "CLIP text", "identity", "prompt", "plain change", "unrelated change"
    ]  # fmt: skip
    figure = measured.base["DINO"]
    margin = (figure.high - figure.low) / 2
    assert re.search(rf"^   base model +{figure.mean:.3f} ± {margin:.3f} .* - +-$", text, re.M)
    chosen = measured.files[0].recommended
    assert re.search(rf"^-> mine β {chosen:g} ", text, re.M) and f"mine: β {chosen:g} is recommended" in text
    assert "is the floor" in text and "0 is best" in text


def test_the_grid_holds_the_pictures(measured, made_by_hand):
    base, _, found = made_by_hand
    grid = Image.open(measured.output_dir / "grid.png").convert("RGB")
    edge, gap = 160, 4
    left, top = grid.width - 3 * (edge + gap), grid.height - 4 * (edge + gap)
    rows = [IMAGES, base[::2], found[0.2][0][::2], found[0.8][0][::2]]
    for j, row in enumerate(rows):
        for i, image in enumerate(row):
            x, y = left + i * (edge + gap), top + j * (edge + gap)
            large = image.convert("RGB").resize((edge, edge), Image.Resampling.NEAREST)
            assert grid.crop((x, y, x + edge, y + edge)).tobytes() == large.tobytes(), (j, i)


def test_pictures_say_what_they_were_made_with(measured):
    from perfusion_pytorch import read_picture_facts

    paths = sorted(measured.output_dir.glob("pictures/mine-*/beta0.2/shown/*.png"))
    assert len(paths) == 6 and len(list(measured.output_dir.rglob("pictures/**/*.png"))) == 8 + 2 * 11
    facts = read_picture_facts(paths[0])
    assert (facts["prompt"], facts["seed"]) == ("a <car-1> on red", 5)
    assert facts["concepts"][0]["beta"] == 0.2


class Stop(Exception):
    pass


@pytest.fixture
def calls(monkeypatch):
    """The prompts that pipelines are called with; `calls.limit` of them, and the next one fails."""
    from diffusers import StableDiffusionPipeline

    class Calls(list):
        limit = 10**6

    seen, own = Calls(), StableDiffusionPipeline.__call__

    def call(self, prompt, **options):
        if len(seen) + len(prompt) > seen.limit:
            raise Stop
        seen.extend(prompt)
        return own(self, prompt, **options)

    call.__signature__ = __import__("inspect").signature(own)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    return seen


def test_a_run_that_was_stopped_goes_on_where_it_was(pipe, made, calls, tmp_path):
    options = {"checkers": [bright], "betas": [0.3, 0.7], "num_images_per_prompt": 1}
    whole = evaluated(pipe, made / "mine.safetensors", tmp_path / "whole", **options)
    assert (whole.num_made, whole.num_kept, len(calls)) == (21, 0, 21)  # 5 of the base model, and 2 times 8
    calls.clear()
    calls.limit = 9
    with pytest.raises(Stop):
        evaluated(pipe, made / "mine.safetensors", tmp_path / "parts", **options)
    assert len(list(tmp_path.glob("parts/pictures/**/*.png"))) == 9
    assert load_concept(pipe, made / "mine.safetensors") == "<car-1>"  # the pipeline was freed of it
    calls.clear()
    calls.limit = 12
    rest = evaluated(tiny_pipe(), made / "mine.safetensors", tmp_path / "parts", **options)
    assert (rest.num_made, rest.num_kept, len(calls)) == (12, 9, 12)
    assert rest.as_json() == whole.as_json()
    calls.clear()
    again = evaluated(tiny_pipe(), made / "mine.safetensors", tmp_path / "parts", **options)
    assert (again.num_made, again.num_kept, len(calls)) == (0, 21, 0) and str(again) == str(whole)


def test_more_betas_prompts_and_files_make_only_what_is_missing(pipe, made, calls, tmp_path):
    options = {"checkers": [bright], "num_images_per_prompt": 1, "superclass": "car"}
    evaluated(pipe, made / "mine.safetensors", tmp_path, betas=[0.3], **options)
    calls.clear()
    more = evaluated(pipe, made / "mine.safetensors", tmp_path, betas=[0.3, 0.4], **options)
    assert (more.num_made, more.num_kept) == (8, 13)
    calls.clear()
    prompts = [*PROMPTS, "the {}"]
    more = evaluated(pipe, made / "mine.safetensors", tmp_path, betas=[0.3], **options | {"prompts": prompts})
    assert sorted(calls) == ["the <car-1>", "the car", "the car"]
    calls.clear()
    more = evaluated(pipe, [made / "inversion.safetensors"], tmp_path, **options)
    assert (more.num_made, more.num_kept) == (8, 5) and "a <my-car> on red" in calls


def test_a_damaged_picture_is_made_again(pipe, made, tmp_path):
    options = {"checkers": [bright], "num_images_per_prompt": 1, "betas": [0.3]}
    first = evaluated(pipe, made / "mine.safetensors", tmp_path, **options)
    path = next(tmp_path.glob("pictures/**/shown/*.png"))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    second = evaluated(pipe, made / "mine.safetensors", tmp_path, **options)
    assert second.num_made == 1 and second.as_json() == first.as_json()
    assert Image.open(path).tobytes()


@pytest.mark.filterwarnings("ignore:Pictures smaller than the resolution")
def test_pictures_of_other_settings_are_not_used(pipe, made, calls, tmp_path):
    options = {"checkers": [bright], "num_images_per_prompt": 1, "betas": [0.3]}
    evaluated(pipe, made / "mine.safetensors", tmp_path, **options)
    calls.clear()
    for changed, message in (
        ({"num_inference_steps": 3}, "num_inference_steps 2, now 3"),
        ({"guidance_scale": 1.0}, "guidance_scale 3.0, now 1.0"),
        ({"resolution": 32}, "height 16, now 32, width 16, now 32"),
    ):
        with pytest.raises(ValueError, match=f"no pictures of other settings, .* made with {message}"):
            evaluated(pipe, made / "mine.safetensors", tmp_path, **options | changed)
    pipe.unet.conv_in.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="made with weights_digest"):
        evaluated(pipe, made / "mine.safetensors", tmp_path, **options)
    assert calls == []


def test_the_pictures_do_not_depend_on_the_batch(pipe, made, tmp_path):
    pictures = []
    for size in (1, 4):
        folder = tmp_path / str(size)
        options = {"checkers": [bright], "betas": [0.3], "batch_size": size}
        evaluated(pipe, made / "mine.safetensors", folder, **options)
        paths = sorted(folder.glob("pictures/**/*.png"))
        pictures.append([torch.tensor(list(Image.open(path).tobytes())) for path in paths])
    differences = [(a - b).abs().max() for a, b in zip(*pictures, strict=True)]
    assert len(differences) == 8 + 11 and max(differences) <= 1  # of 255: batches round differently


def test_files_of_all_kinds_are_compared_in_one_run(pipe, made, tmp_path):
    files = [made / name for name in ("mine.safetensors", "diffusers", "peft", "inversion.safetensors")]
    words = {str(files[1]): "a sks car", str(files[2]): "a sks car"}
    options = {"checkers": [bright], "num_images_per_prompt": 1, "words": words}
    result = evaluated(pipe, files, tmp_path, betas=[0.3], scales=[0.5, 1.0], **options)
    assert [(f.candidate.name, [row.strength for row in f.strengths]) for f in result.files] == [
        ("mine", [0.3]),
        ("diffusers", [0.5, 1.0]),
        ("peft", [0.5, 1.0]),
        ("inversion", [None]),
    ]
    _, one, other, inversion = result.files
    assert [row.figures["identity"].mean for row in one.strengths] == pytest.approx(
        [row.figures["identity"].mean for row in other.strengths], abs=0.002
    )
    assert one.strengths[1].figures["plain change"].mean > one.strengths[0].figures["plain change"].mean > 0
    assert inversion.recommended is None and inversion.summary["plain change"].mean == 0
    assert inversion.summary["unrelated change"].mean == 0
    text = str(result)
    assert re.search(r"diffusers scale 0.5 ", text) and re.search(r"^   inversion ", text, re.M)


def test_the_recommended_beta_is_written_into_the_file(pipe, made, tmp_path):
    (tmp_path / "car").mkdir()
    path = tmp_path / "car" / "concept.safetensors"
    Concept.load(made / "mine.safetensors").save(path, dtype=torch.bfloat16)
    before = Concept.load(path)
    options = {"checkers": [bright], "num_images_per_prompt": 1, "betas": [0.31, 0.77]}
    result = evaluated(pipe, tmp_path / "car", tmp_path / "out", write=True, **options)
    after = Concept.load(path)
    chosen = result.files[0].recommended
    assert chosen in (0.31, 0.77) and after.eval_gate == (chosen, before.eval_gate[1])
    assert after.has_equal_tensors(before) and after.token == before.token and after.superclass == "car"
    assert {row.dtype for row in after.outputs.values()} == {torch.bfloat16}
    beside = json.loads((tmp_path / "car" / "evaluation.json").read_bytes())
    assert beside == result.as_json() and result.files[0].candidate.name == "car"
    again = evaluated(tiny_pipe(), path, tmp_path / "out", write=True, **options)
    assert again.num_made == 0 and again.files[0].recommended == chosen  # its new β changes no picture


def test_nothing_is_written_into_the_file_unless_asked(pipe, made, tmp_path):
    path = shutil.copy(made / "mine.safetensors", tmp_path / "mine.safetensors")
    before = path.read_bytes()
    evaluated(pipe, path, tmp_path / "out", checkers=[bright], num_images_per_prompt=1, betas=[0.31])
    assert path.read_bytes() == before and not (tmp_path / "evaluation.json").exists()


def test_without_a_figure_of_prompts_nothing_is_recommended(pipe, made, tmp_path, dino):
    options = {"num_images_per_prompt": 1, "betas": [0.3, 0.7], "dino_model": dino}
    result = evaluated(pipe, made / "mine.safetensors", tmp_path, **options)
    assert result.files[0].recommended is None and result.summary == {}
    assert "no strength is recommended, since there is no figure of following prompts" in str(result)
    assert not (tmp_path / "pareto.png").exists() and (tmp_path / "grid.png").exists()


def test_what_cannot_work_is_refused_before_any_picture(pipe, made, calls, tmp_path):
    mine, lora, rows = made / "mine.safetensors", made / "peft", made / "two-rows.safetensors"
    for files, options, message in (
        (mine, {}, "There must be something to measure with: give `clip_model`, `dino_model` or `checkers`"),
        (mine, {"checkers": [lambda *given: {}]}, "The checker <lambda> must return a mapping"),
        (mine, {"betas": []}, r"`betas` must be one or more different numbers, got \[\]"),
        (mine, {"scales": [1, 1.0]}, "`scales` must be one or more different numbers"),
        (mine, {"num_images_per_prompt": 0}, "must be at least 1, got 0 and 1"),
        (mine, {"seed": -1}, "`seed` must be a whole number from 0"),
        (mine, {"resolution": 17}, "`resolution` must be a multiple of 2 pixels, got 17"),
        (mine, {"prompts": ["a car"]}, "must hold prompts with a {} in the place of the thing"),
        (lora, {"words": "sks car"}, "`superclass` must be given, since no file says it"),
        (
            lora,
            {"words": "w", "superclass": "car", "write": True},
            "`write` needs a concept file of Perfusion",
        ),
        ([mine, rows], {"words": "<two>", "dino_model": tmp_path}, "`dino_model` must be a DINO model's"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluated(pipe, files, tmp_path / "out", **{"checkers": [bright] if options else ()} | options)
    assert calls == [] and not (tmp_path / "out").exists()


def test_two_runs_in_one_folder_are_refused(pipe, made, tmp_path):
    from perfusion_pytorch.training.run_folder import lock, unlock

    held = lock(tmp_path)
    with pytest.raises(ValueError, match="`output_dir` must not be in use by another run"):
        evaluated(pipe, made / "mine.safetensors", tmp_path, checkers=[bright])
    unlock(tmp_path, held)


def test_progress_counts_pictures(pipe, made, tmp_path, capsys):
    options = {"checkers": [bright], "betas": [0.3], "num_images_per_prompt": 1, "progress": True}
    evaluated(pipe, made / "mine.safetensors", tmp_path, **options)
    err = capsys.readouterr().err
    assert "13/13" in err and "Loading" not in err and "0/2" not in err
