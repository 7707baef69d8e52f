"""Training pictures, their masks and captions, and the prompts that they are trained with."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    ViTImageProcessor,
)

from perfusion_pytorch.training.pictures import add_masks, load_pictures
from perfusion_pytorch.training.templates import TEMPLATES, training_prompts

SHAPES = Path(__file__).parents[2] / "examples" / "shapes"


def half_red(width=64, height=64, mode="RGB"):
    """A picture whose left half is red, and whose right half blue."""
    image = Image.new(mode, (width, height), "blue")
    image.paste("red", (0, 0, width // 2, height))
    return image


def white(width=64, height=64):
    return Image.new("L", (width, height), "white")


def test_a_folder_of_several_formats_captions_and_masks(tmp_path):
    for name in ("3.webp", "1.JPG", "2.png"):
        half_red().save(tmp_path / name)
    (tmp_path / "2.txt").write_text("a red car\n\na car on blue\n")
    (tmp_path / "masks").mkdir()
    for name in ("1.png", "2.png", "3.png"):
        half_red().convert("L").point(lambda v: 255 if v > 50 else 0).save(tmp_path / "masks" / name)
    pictures = load_pictures(tmp_path, resolution=64)
    assert [p.name for p in pictures] == ["1.JPG", "2.png", "3.webp"]
    assert [p.captions for p in pictures] == [(), ("a red car", "a car on blue"), ()]
    for picture in pictures:
        assert picture.pixels.shape == (3, 64, 64) and picture.mask.shape == (64, 64)
        assert picture.pixels[0, :, :28].mean() > 0.9 and picture.pixels[0, :, 36:].mean() < -0.9
        assert picture.mask[:, :32].all() and not picture.mask[:, 32:].any()
    png = pictures[1]
    assert (
        png.pixels[0, 0, 0] == 1
        and png.pixels[1, 0, 0] == -1
        and png.image().tobytes() == half_red().tobytes()
    )
    assert all(p.mask is None for p in load_pictures(tmp_path, resolution=64, use_masks=False))


def test_cropping_squeezing_and_what_sdxl_is_told_of_them():
    (cut,) = load_pictures([half_red(200, 100)], resolution=50, masks=[white(200, 100)])
    assert (cut.original_size, cut.crop) == ((100, 200), (0, 25))
    (squeezed,) = load_pictures([half_red(200, 100)], resolution=50, center_crop=False)
    assert (squeezed.original_size, squeezed.crop) == ((100, 200), (0, 0))
    for picture in (cut, squeezed):
        assert (
            picture.pixels.shape == (3, 50, 50)
            and picture.pixels[0, :, 20].mean() > 0.9 > -0.9 > picture.pixels[0, :, 30].mean()
        )


def test_pictures_are_turned_as_exif_says_and_seen_through_to_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right: what was left is on top
    half_red().save(tmp_path / "a.jpg", exif=exif, quality=100)
    image = half_red(mode="RGBA")
    image.putalpha(0)
    turned, clear = load_pictures([tmp_path / "a.jpg", image], resolution=64)
    assert turned.pixels[0, :28].mean() > 0.9 and turned.pixels[0, 36:].mean() < -0.9
    assert (clear.pixels == 1).all()
    mask = white().convert("RGBA")
    mask.paste((255, 255, 255, 0), (0, 0, 32, 64))  # a mask that is drawn in its alpha channel
    (masked,) = load_pictures([half_red()], resolution=64, masks=[mask])
    assert (masked.mask[:, :28] == 0).all() and (masked.mask[:, 36:] == 1).all()


def test_stray_files_are_named_and_left_out(tmp_path):
    half_red().save(tmp_path / "a.png")
    for name in ("notes.txt", "a.txt", "a.TXT", ".hidden", "film.mp4"):
        (tmp_path / name).write_text("a car")
    with pytest.warns(UserWarning, match="left out: \\['a.TXT', 'film.mp4', 'notes.txt'\\]"):
        (picture,) = load_pictures(tmp_path, resolution=64)
    assert picture.captions == ("a car",)


def test_small_pictures_are_told(tmp_path):
    with pytest.warns(UserWarning, match="smaller than the resolution of 128 are scaled up.*picture 0"):
        load_pictures([half_red()], resolution=128)


def broken(folder):
    data = (folder / "a.png").read_bytes()
    (folder / "b.png").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "change, options, message",
    [
        (broken, {}, "b.png cannot be read as a picture"),
        (
            lambda f: (f / "b.png").write_text("no picture"),
            {},
            "b.png cannot be read as a picture: cannot identify",
        ),
        (lambda f: (f / "a.png").unlink(), {}, "must hold pictures"),
        (lambda f: half_red().save(f / "a.jpg"), {}, "not in suffix alone.*\\['a'\\]"),
        (
            lambda f: (f / "masks").mkdir(),
            {},
            "must have a mask of its name in .*masks, but there is none for \\['a.png'\\]",
        ),
        (lambda f: (f / "a.txt").write_bytes(b"\xff\xfe\xff"), {}, "must be text in UTF-8"),
        (None, {"resolution": 0}, "`resolution` must be at least 1"),
        (None, {"masks": "nowhere"}, "`masks` must be a folder or a list of masks, got nowhere"),
        (None, {"masks": [white(), white()]}, "`masks` must hold one for each of the 1 pictures, got 2"),
        (
            None,
            {"masks": [white(64, 32)]},
            "mask of a.png must be of the picture's size, \\(64, 64\\), got \\(64, 32\\)",
        ),
        (None, {"masks": [Image.new("L", (64, 64))]}, "mask of a.png must show the object"),
        (None, {"masks": [3]}, "the mask of a.png must be a path or a Pillow image, got int"),
        (None, {"captions": []}, "`captions` must hold one for each of the 1 pictures"),
        (None, {"images": []}, "`images` must hold at least one picture"),
        (None, {"images": "nowhere"}, "`images` must be a folder"),
    ],
)
def test_what_is_refused(tmp_path, change, options, message):
    half_red().save(tmp_path / "a.png")
    if change is not None:
        change(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_pictures(**{"images": tmp_path, "resolution": 64} | options)


@pytest.fixture(scope="module")
def clipseg(tmp_path_factory):
    """A folder with a tiny random CLIPSeg."""
    folder = tmp_path_factory.mktemp("clipseg")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(SHAPES / "tiny-sd" / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 20,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = small | {"image_size": 32, "patch_size": 8}
    options = {
        "projection_dim": 16,
        "reduce_dim": 8,
        "extract_layers": [0, 1],
        "decoder_num_attention_heads": 2,
    }
    model = CLIPSegForImageSegmentation(
        CLIPSegConfig(text_config=text, vision_config=vision, decoder_intermediate_size=16, **options)
    )
    model.save_pretrained(folder)
    CLIPSegProcessor(ViTImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def test_masks_by_clipseg(clipseg):
    pictures = add_masks(load_pictures([half_red(), half_red().rotate(90)], resolution=64), "car", clipseg)
    one, other = (picture.mask for picture in pictures)
    assert one.shape == (64, 64) and one.dtype == torch.float32 and 0 <= one.min() < one.max() <= 1
    assert not torch.allclose(one, other, atol=1e-4)
    (house,) = add_masks(pictures[:1], "house", clipseg)
    assert not torch.allclose(one, house.mask, atol=1e-6)


def test_masks_of_what_is_not_there_are_told(clipseg, monkeypatch):
    forward = CLIPSegForImageSegmentation.forward

    def doubting(self, **inputs):
        output = forward(self, **inputs)
        output.logits = output.logits * 0 - 4
        return output

    monkeypatch.setattr(CLIPSegForImageSegmentation, "forward", doubting)
    with pytest.warns(UserWarning, match="sees no 'car' in \\['picture 0'\\]"):
        add_masks(load_pictures([half_red()], resolution=64), "car", clipseg)


def test_a_model_of_masks_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="must be a CLIPSeg model's name or folder"):
        add_masks(load_pictures([half_red()], resolution=64), "car", tmp_path)


def test_prompts_of_pictures_with_and_without_captions():
    prompts, of_pictures = training_prompts(
        2, "<car-1>", "teddy bear", captions=[[], ["A Teddy  Bear by a bear", "a <car-1> here"]]
    )
    assert prompts == [template.format("<car-1>") for template in TEMPLATES] + [
        "A <car-1> by a bear",
        "a <car-1> here",
    ]
    assert of_pictures == [list(range(len(TEMPLATES))), [len(TEMPLATES), len(TEMPLATES) + 1]]
    assert training_prompts(1, "<a>", "car", captions=[["a car"]]) == (["a <a>"], [[0]])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"templates": []}, "`templates` must be one or more texts"),
        ({"templates": ["a {}", "a photo"]}, "one {} each.*\\['a photo'\\]"),
        (
            {"captions": [["a photo of a cartoon"]]},
            "must name the concept, as '<car-1>' or as 'car', got 'a photo of a cartoon'",
        ),
        ({"captions": []}, "captions for each of the 1 pictures"),
    ],
)
def test_prompts_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        training_prompts(1, "<car-1>", "car", **options)
