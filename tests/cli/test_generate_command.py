"""`perfusion generate`: pictures with and without concepts, one or a grid."""

import re

import pytest
import torch
from helpers.small_model import MODEL, make_pipe
from helpers.tiny_pipes import tiny_pipe
from PIL import Image, ImageChops

from perfusion_pytorch import Concept, InputCovariance, global_key_lock, load_concept, set_concepts

WITH_MODEL = ["--pretrained_model_name_or_path", str(MODEL)]
FAST = ["--num_inference_steps", "2", "--device", "cpu", "--no_progress"]


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_picture_is_made_in_the_precision_that_is_asked_for(run, tmp_path, dtype):
    path = tmp_path / "p.png"
    flags = ["--prompt", "a car", "--output", path, "--dtype", str(dtype).removeprefix("torch.")]
    assert run("generate", *WITH_MODEL, *FAST, *flags)[0] == 0
    pictures = {
        precision: make_pipe()
        .to(precision)("a car", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
        .images[0]
        for precision in (torch.float32, torch.bfloat16)
    }
    assert [same(Image.open(path), picture) for picture in pictures.values()] == [
        precision == dtype for precision in pictures
    ]


def test_progress_is_shown_unless_it_is_switched_off(run, tmp_path):
    flags = ["--prompt", "a car", "--num_inference_steps", "2", "--device", "cpu"]
    command = ["generate", *WITH_MODEL, *flags, "--output", tmp_path / "p.png"]
    assert "0/2" in run(*command)[2]
    assert run(*command, "--no_progress")[2] == ""


@pytest.mark.slow
def test_a_pipeline_of_sdxl(run, captions, tmp_path):
    """From the covariance to pictures, with `info` and `similarities` between them."""
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
