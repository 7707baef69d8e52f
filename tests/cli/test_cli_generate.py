"""The command line with concepts: what the gate sees of prompts, and pictures of them."""

import json
import re
from types import SimpleNamespace

import torch
from helpers.small_model import MODEL, make_pipe
from helpers.tiny_pipes import tiny_pipe
from PIL import Image, ImageChops

from perfusion_pytorch import Concept, InputCovariance, global_key_lock, load_concept, set_concepts
from perfusion_pytorch.cli import commands as cli_commands

WITH_MODEL = ["--pretrained_model_name_or_path", str(MODEL)]
FAST = ["--num_inference_steps", "2", "--device", "cpu", "--no_progress"]

# similarities


def test_similarities_as_a_table_and_as_json(run, concepts):
    flags = [
        "similarities",
        *WITH_MODEL,
        "--device",
        "cpu",
        "--concept",
        concepts / "car.safetensors",
        concepts / "bear.safetensors",
    ]
    code, out, err = run(*flags)
    assert (code, err) == (0, "")
    prompts = [f"a photo of a {word}" for word in ("<car-1>", "car", "<bear-1>", "teddy bear")]
    assert [line for line in out.splitlines() if line[0] not in " r"] == prompts
    code, out, _ = run(*flags, "--json", "--prompt", "a <car-1> on a <bear-1>", "a house")
    first, second = json.loads(out)
    assert code == 0 and [entry["token"] for entry in first["tokens"]] == [
        "<|startoftext|>", "a", "<car-1>", "on", "a", "<bear-1>", "(end, padding)",
    ]  # fmt: skip
    assert first["tokens"][2]["r"]["<car-1>"] > 0.5 and set(second["tokens"][0]["r"]) == {
        "<car-1>",
        "<bear-1>",
    }


def test_similarities_are_remarked_upon(run, concepts):
    flags = [
        "similarities",
        *WITH_MODEL,
        "--device",
        "cpu",
        "--concept",
        concepts / "car.safetensors",
        "--prompt",
        "a <car-1> on red",
    ]
    _, out, _ = run(*flags, "--beta", "-9", "--json")
    said = json.loads(out)[0]["remarks"]
    assert any(
        re.match(
            r"red is at r = .*, above β -9: <car-1> shows there too. (A higher β keeps it out.|No β tells)",
            line,
        )
        for line in said
    )
    _, out, _ = run(*flags, "--beta", "<car-1>=9")
    assert (
        "  ! <car-1> is at r = " in out
        and "below β 9: the gate hides the concept" in out
        and "(9 of <car-1>)" in out
    )
    _, out, _ = run(*flags, "--beta", "-0.5", "--json")
    (own,) = (entry["r"]["<car-1>"] for entry in json.loads(out)[0]["tokens"] if entry["token"] == "<car-1>")
    assert any("far from 1" in line for line in json.loads(out)[0]["remarks"]) == (abs(own - 1) > 0.2)


def test_remarks_say_what_can_be_done():
    concept = SimpleNamespace(token="<car-1>", eval_gate=(0.7, 0.15))

    def remarks(**similarities):
        return cli_commands._remarks([(token, (r,)) for token, r in similarities.items()], [concept])

    assert remarks(a=0.1, **{"<car-1>": 0.95}, house=0.69) == []
    assert remarks(**{"<car-1>": 0.95}, house=0.8) == [
        "house is at r = 0.80, above β 0.7: <car-1> shows there too. A higher β keeps it out."
    ]
    (line,) = remarks(**{"<car-1>": 0.95}, house=0.96)
    assert line.endswith("No β tells the two apart: train longer, or with more captions.")
    assert [line[:24] for line in remarks(**{"<car-1>": 0.6}) + remarks(**{"<car-1>": 1.3})] == [
        "<car-1> is at r = 0.60, ",
        "<car-1> is at r = 1.30, ",
    ]
    assert remarks(car=0.8)[0].endswith("A higher β keeps it out.") and "No β" in remarks(car=1.0)[0]


def test_a_file_that_is_no_concept_is_found_before_the_model_is_loaded(run, tmp_path):
    for command in ("generate", "similarities"):
        flags = ["--pretrained_model_name_or_path", "./none", "--concept", tmp_path / "none", "--prompt", "a"]
        assert "There is no concept file" in run(command, *flags)[2]


# generate


def picture_of(prompt, seed=0, concept=None, beta=None, lock=False, **options):
    pipe = make_pipe()
    if concept is not None:
        name = load_concept(pipe, concept)
        set_concepts(pipe, name, beta=beta)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed)} | options
    if lock:
        with global_key_lock(pipe):
            return pipe(prompt, **options).images[0]
    return pipe(prompt, **options).images[0]


def same(image, other):
    return image.size == other.size and image.convert("RGB").tobytes() == other.convert("RGB").tobytes()


def test_one_picture_is_the_pipelines_own(run, tmp_path):
    path = tmp_path / "new" / "car.png"
    code, out, err = run(
        "generate",
        *WITH_MODEL,
        *FAST,
        "--prompt",
        "a car",
        "--seed",
        "5",
        "--guidance_scale",
        "4",
        "--output",
        path,
    )
    assert (code, err) == (0, "") and f"Wrote {path}." in out and "1 picture in " in out
    assert same(Image.open(path), picture_of("a car", seed=5, guidance_scale=4.0))
    assert Image.open(path).text["Description"] == "a car"


def test_a_picture_with_a_concept(run, concepts, tmp_path):
    path, car = tmp_path / "car.png", concepts / "car.safetensors"
    flags = [
        "generate",
        *WITH_MODEL,
        *FAST,
        "--prompt",
        "a <car-1> on red",
        "--concept",
        car,
        "--output",
        path,
    ]
    code, out, err = run(
        *flags,
        "--beta",
        "0.4",
        "--temperature",
        "<car-1>=0.2",
        "--negative_prompt",
        "a house",
        "--resolution",
        "32",
    )
    assert (code, err) == (0, "") and f"Loaded <car-1> (car), β 0.4, τ 0.2, from {car}." in out
    pipe = make_pipe()
    set_concepts(pipe, load_concept(pipe, car), beta=0.4, temperature=0.2)
    options = {
        "num_inference_steps": 2,
        "height": 32,
        "width": 32,
        "generator": torch.Generator().manual_seed(0),
    }
    assert same(Image.open(path), pipe("a <car-1> on red", negative_prompt="a house", **options).images[0])
    run(*flags, "--global_key_lock", "--height", "32", "--width", "64")
    locked = picture_of("a <car-1> on red", concept=car, lock=True, height=32, width=64)
    assert same(Image.open(path), locked) and locked.size == (64, 32)


def test_a_grid_over_betas_and_prompts_and_seeds(run, concepts, tmp_path):
    car, prompts = concepts / "car.safetensors", ["a <car-1>", "a photo of a <car-1> on a blue background"]
    flags = [
        "generate",
        *WITH_MODEL,
        *FAST,
        "--concept",
        car,
        "--betas",
        "0.3",
        "0.9",
        "--num_images_per_prompt",
        "2",
        "--prompt",
        *prompts,
    ]
    code, out, err = run(*flags, "--output", tmp_path / "grid.png", "--output_dir", tmp_path / "each")
    assert (code, err) == (0, "") and "8 pictures in " in out and str(tmp_path / "each") in out
    names = {path.name for path in (tmp_path / "each").iterdir()}
    assert (
        len(names) == 8
        and {"1-a-car-1-seed0-beta0.3.png", "2-a-photo-of-a-car-1-on-a-blue-background-seed1-beta0.9.png"}
        <= names
    )
    each = Image.open(tmp_path / "each" / "1-a-car-1-seed1-beta0.9.png")
    assert same(each, picture_of("a <car-1>", seed=1, concept=car, beta=0.9))
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 4 * 192 and grid.height > 2 * 192
    large = each.convert("RGB").resize((192, 192), Image.Resampling.NEAREST)
    x, y = grid.width - 3 * 196, grid.height - 196
    assert same(grid.crop((x, y, x + 192, y + 192)), large)
    run(*flags, "--output", tmp_path / "grid.png", "--output_dir", tmp_path / "batched", "--batch_size", "3")
    for name in names:
        difference = ImageChops.difference(
            *(Image.open(tmp_path / folder / name) for folder in ("each", "batched"))
        )
        assert max(high for _, high in difference.getextrema()) <= 2, (
            name
        )  # of 255: batches round differently


def test_concepts_under_one_token_and_their_own_gates(run, concepts, tmp_path):
    car, bear = concepts / "car.safetensors", concepts / "bear.safetensors"
    flags = [
        "generate",
        *WITH_MODEL,
        *FAST,
        "--prompt",
        "a <car-1> on a <bear-1>",
        "--output",
        tmp_path / "p.png",
    ]
    code, out, err = run(*flags, "--concept", car, "--concept", bear, "--beta", "0.6", "<bear-1>=0.5")
    assert (code, err) == (0, "") and "<car-1> (car), β 0.6" in out and "<bear-1> (teddy bear), β 0.5" in out
    code, _, err = run(*flags, "--concept", car, "--beta", "<cat-1>=0.5")
    assert code == 1 and "`--beta` must name one of the loaded concepts ['<car-1>'], got ['<cat-1>']" in err


def test_a_prompt_without_the_concept_is_a_warning(run, concepts, tmp_path):
    flags = [
        "generate",
        *WITH_MODEL,
        *FAST,
        "--concept",
        concepts / "car.safetensors",
        "--output",
        tmp_path / "p.png",
    ]
    code, _, err = run(*flags, "--prompt", "a car")
    assert (code, err) == (
        0,
        "perfusion: warning: The prompt 'a car' names none of the concepts ['<car-1>'].\n",
    )
    code, _, err = run(*flags, "--prompt", "a <car-1> and a <dog-1>")
    assert (
        code == 0
        and err.startswith("perfusion: warning: No concept named <dog-1> is loaded")
        and len(err.splitlines()) == 1
    )


def test_precision_and_progress(run, tmp_path):
    flags = [
        "generate",
        *WITH_MODEL,
        "--prompt",
        "a car",
        "--num_inference_steps",
        "2",
        "--device",
        "cpu",
        "--output",
        tmp_path / "p.png",
    ]
    code, _, err = run(*flags, "--dtype", "bfloat16")
    assert code == 0 and "0/2" in err


def test_a_pipeline_of_sdxl(run, captions, tmp_path):
    """From the covariance to pictures, and what is told of the file between them."""
    tiny_pipe("SDXL").save_pretrained(tmp_path / "xl")
    model = ["--pretrained_model_name_or_path", tmp_path / "xl"]
    assert (
        run(
            "covariance",
            *model,
            "--captions",
            captions,
            "--cache_dir",
            tmp_path,
            "--output",
            tmp_path / "c",
            "--no_progress",
        )[0]
        == 0
    )
    assert InputCovariance.load(tmp_path / "c").dim == 32
    pipe = tiny_pipe("SDXL")
    encodings = pipe.encode_prompt(
        "a photo of a car", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )[0][0]
    car, i = pipe.tokenizer("car", add_special_tokens=False).input_ids[0], encodings[5].detach().clone()
    Concept(
        token="<car-1>",
        superclass="car",
        base_model=type(pipe.unet).__name__,
        embeddings={
            name: getattr(pipe, name).get_input_embeddings().weight[car].detach()
            for name in ("text_encoder", "text_encoder_2")
        },
        concept_input=i,
        concept_dual=i / (i @ i),
        superclass_input=encodings[4].detach().clone(),
        concept_norm=(i @ i).item(),
        outputs={
            name: torch.ones(m.out_features)
            for name, m in pipe.unet.named_modules()
            if name.endswith("attn2.to_v")
        },
    ).save(tmp_path / "car.safetensors")
    code, out, _ = run("info", tmp_path / "car.safetensors")
    assert code == 0 and "12 (text_encoder) + 20 (text_encoder_2)" in out
    code, out, err = run(
        "similarities", *model, "--concept", tmp_path / "car.safetensors", "--prompt", "a photo of a <car-1>"
    )
    assert (code, err) == (0, "") and re.search(r"^  <car-1> +1.00$", out, re.M)
    flags = [
        "--concept",
        tmp_path / "car.safetensors",
        "--prompt",
        "a photo of a <car-1>",
        "--output",
        tmp_path / "p.png",
    ]
    assert run("generate", *model, *FAST, *flags, "--betas", "0.5", "0.9")[0] == 0
    assert Image.open(tmp_path / "p.png").width > 160
