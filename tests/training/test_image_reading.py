"""Images of every kind and pixel depth are read as they are meant to be seen."""

import gc
import io
import struct
import sys
import types
import zlib

import numpy as np
import pytest
import torch
from helpers.pictures import half_red
from PIL import Image

from perfusion_pytorch.training.image_reading import FIRST_FRAME, ORIENTATION, read_image

EDGE = 16
GREYS = Image.frombytes("L", (EDGE, EDGE), bytes(range(256)))
WIDE = torch.arange(256, dtype=torch.int32).view(EDGE, EDGE) * 257  # the same greys in 16 bits
COLOURS = Image.merge("RGB", (GREYS, GREYS.rotate(90), GREYS.rotate(180)))


def numbers(image):
    return np.asarray(image).astype(int)


def png(width, height, depth, kind, rows, transparent=b""):
    """A PNG file of any bit depth; Pillow writes few. `kind`: 0 grey, 2 RGB, 4 grey and alpha."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))]
    if transparent:
        parts.append(chunk(b"tRNS", transparent))
    parts.append(chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def tiff(bits, photometric, data):
    """A grey TIFF file of two pixels in a row."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1)]
    tags.append((279, len(data)))
    start = 8 + len(data) + len(data) % 2
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", start) + data.ljust(start - 8, b"\0") + directory


def in_file(tmp_path, data, name="a.png"):
    (tmp_path / name).write_bytes(data)
    return tmp_path / name


WIDE_IMAGES = {
    "I;16": Image.frombytes("I;16", (EDGE, EDGE), WIDE.numpy().astype("<u2").tobytes()),
    "I;16B": Image.frombytes("I;16B", (EDGE, EDGE), WIDE.numpy().astype(">u2").tobytes()),
    "F": Image.frombytes("F", (EDGE, EDGE), (WIDE / 65535).float().numpy().tobytes()),
    "array uint16": WIDE.numpy().astype(np.uint16),
    "array float": WIDE.numpy() / 65535,
    "tensor uint16": WIDE.to(torch.uint16),
    "tensor half": (WIDE / 65535).half()[None],
}


@pytest.mark.parametrize("kind", WIDE_IMAGES)
def test_wide_greys_are_scaled_by_their_own_range(kind):
    image = WIDE_IMAGES[kind]
    read = read_image(image, "a.png")
    assert np.array_equal(numbers(read.colours)[:, :, 0], numbers(GREYS)) and read.alpha is None


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_files_of_16_bits(tmp_path, suffix):
    """Pillow opens some of them as I;16, and some as I, depending on its version and their format."""
    WIDE_IMAGES["I;16"].save(tmp_path / f"a.{suffix}")
    read = read_image(tmp_path / f"a.{suffix}", "a")
    assert np.array_equal(numbers(read.colours)[:, :, 1], numbers(GREYS))


@pytest.mark.parametrize(
    ("mode", "tolerance"), [("RGB", 0), ("RGBX", 0), ("CMYK", 0), ("YCbCr", 3), ("HSV", 8), ("LAB", 30)]
)
def test_colours_of_every_mode(mode, tolerance):
    image = COLOURS
    if mode == "LAB":
        from PIL import ImageCms

        to_lab = ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        )
        image = ImageCms.applyTransform(COLOURS, to_lab)
    image = image.convert(mode)
    assert image.mode == mode
    read = read_image(image, "a")
    error = abs(numbers(read.colours) - numbers(COLOURS))
    assert error.max() <= tolerance and error.mean() < 1.5  # 8 bits of LAB are coarse at saturated colours
    assert read.alpha is None


def test_black_and_white_and_palettes():
    white_right = Image.new("1", (4, 2))
    white_right.paste(1, (2, 0, 4, 2))
    assert numbers(read_image(white_right, "a").colours)[0, :, 0].tolist() == [0, 0, 255, 255]
    palette = half_red(4, 2).convert("P", palette=Image.Palette.ADAPTIVE)
    assert numbers(read_image(palette, "a").colours)[0].tolist() == [[255, 0, 0]] * 2 + [[0, 0, 255]] * 2


def half_clear(mode):
    """An image whose left half is red, or grey 76, and opaque, and whose right half cannot be seen."""
    image = half_red(4, 2).convert("RGBA")
    image.paste((0, 0, 255, 0), (2, 0, 4, 2))
    if mode == "palette":
        clear = Image.new("P", (4, 2), 1)
        clear.putpalette([0, 0, 255, 255, 0, 0])
        clear.paste(0, (2, 0, 4, 2))
        clear.info["transparency"] = 0
        return clear
    if mode == "La":
        return image.convert("LA").convert("La")
    if mode == "PA":
        palette = image.convert("RGB").quantize(4).convert("PA")
        palette.putalpha(image.getchannel("A"))
        return palette
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA", "palette"])
def test_what_can_be_seen_through_is_white_with_its_alpha_beside(mode):
    read = read_image(half_clear(mode), "a")
    assert numbers(read.alpha)[0].tolist() == [255, 255, 0, 0]
    assert (numbers(read.colours)[:, 2:] == 255).all()
    left = numbers(read.colours)[0, 0]
    assert left.tolist() == ([76, 76, 76] if mode.startswith("L") else [255, 0, 0])


def test_an_alpha_channel_that_is_opaque_everywhere_counts_as_none():
    read = read_image(half_red(4, 2).convert("RGBA"), "a")
    assert read.alpha is None and read.colours.tobytes() == half_red(4, 2).tobytes()


@pytest.mark.parametrize(
    ("file", "grey", "alpha"),
    [
        (png(4, 1, 1, 0, [b"\x50"], b"\0\1"), [0, 255, 0, 255], [255, 0, 255, 0]),
        (png(4, 1, 2, 0, [b"\x1b"], b"\0\3"), [0, 85, 170, 255], [255, 255, 255, 0]),
        (png(2, 1, 4, 0, [b"\x5f"], b"\0\x05"), [255, 255], [0, 255]),
        (png(2, 1, 8, 0, [b"\x07\x08"], b"\0\x08"), [7, 255], [255, 0]),
        (png(2, 1, 16, 0, [b"\x12\x34\x12\x35"], b"\x12\x35"), [18, 255], [255, 0]),
        (png(2, 1, 16, 2, [b"\x12\x34" * 3 + b"\x80\0" * 3], b"\x12\x34" * 3), [255, 128], [0, 255]),
        (png(2, 1, 16, 2, [b"\0\xc8" * 3 + b"\x80\0" * 3], b"\0\xc8" * 3), [0, 128], [0, 255]),
        (png(2, 1, 16, 4, [b"\x12\x34\xff\xff\x80\0\0\0"]), [18, 255], [255, 0]),
        (png(2, 1, 16, 2, [b"\x12\x34" * 3 + b"\x80\0" * 3]), [18, 128], None),
    ],
    ids=[
        "1 bit",
        "2 bits",
        "4 bits",
        "8 bits",
        "16 bits",
        "RGB of 16",
        "dark RGB of 16",
        "grey and alpha of 16",
        "opaque",
    ],
)
def test_png_files_that_declare_a_transparent_colour(tmp_path, file, grey, alpha):
    """Pillow compares that colour with numbers that it has scaled, or cut to 8 bits."""
    read = read_image(in_file(tmp_path, file), "a")
    if alpha is None:
        assert read.alpha is None
    else:
        assert numbers(read.alpha)[0].tolist() == alpha
        grey = [255 if seen == 0 else value for value, seen in zip(grey, alpha, strict=True)]
    assert numbers(read.colours)[0, :, 0].tolist() == grey


def test_a_tiff_of_12_bits_is_scaled_by_4095(tmp_path):
    read = read_image(in_file(tmp_path, tiff(12, 1, b"\xff\xf8\x00"), "a.tif"), "a")
    assert numbers(read.colours)[0, :, 0].tolist() == [255, 128]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("I", (4, 4), 3), "a.png is of Pillow's mode I, whose largest number can be anything"),
        (
            Image.new("F", (4, 4), 200),
            "a.png, of Pillow's mode F, must hold floats from 0 to 1, got 200 to 200",
        ),
        (Image.new("F", (4, 4), float("nan")), "must hold floats from 0 to 1, got nan"),
        (torch.full((3, 4, 4), -1.0), "a.png must hold floats from 0 to 1, got -1 to -1"),
        (np.zeros((4, 4), dtype=np.int64), "a.png must hold booleans, .*, got int64"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "must hold booleans, .*, got torch.int64"),
        (
            np.zeros((3, 8, 8)),
            "must have shape \\(h, w\\) or \\(h, w, 1, 3 or 4 channels\\), got \\(3, 8, 8\\)",
        ),
        (
            torch.zeros(8, 8, 3),
            "must have shape \\(h, w\\) or \\(1, 3 or 4 channels, h, w\\), got \\(8, 8, 3\\)",
        ),
        (np.zeros((0, 4)), "must have shape"),
        (3, "a.png must be a path, a Pillow image, an array or a tensor, got int"),
        ({"image": 3}, "got dict"),
    ],
)
def test_numbers_of_no_known_range_are_refused_by_name(image, message):
    with pytest.raises(ValueError, match=message):
        read_image(image, "a.png")


def test_a_tiff_that_stores_white_as_0_is_refused_in_16_bits_and_right_in_8(tmp_path):
    with pytest.raises(ValueError, match="must store black as 0, but it is a TIFF of mode I;16"):
        read_image(in_file(tmp_path, tiff(16, 0, b"\0\0\xff\xff"), "a.tif"), "a")
    read = read_image(in_file(tmp_path, tiff(8, 0, b"\x00\xff"), "b.tif"), "b")
    assert numbers(read.colours)[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.uint16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)])
def test_arrays_and_tensors_of_every_kind(dtype, channels):
    top = {"b": 1, "u": np.iinfo(dtype).max if dtype in (np.uint8, np.uint16) else 0, "f": 1}[
        np.dtype(dtype).kind
    ]
    array = np.zeros((2, 4, *channels), dtype)
    array[:, 2:] = top
    tensor = torch.tensor(array)
    tensor = tensor.movedim(-1, 0) if channels else tensor
    for image in (array, tensor):
        read = read_image(image, "a")
        assert numbers(read.colours)[:, 2:].tolist() == np.full((2, 2, 3), 255).tolist()
        if channels == (4,):
            assert numbers(read.alpha)[0].tolist() == [0, 0, 255, 255]
        else:
            assert (numbers(read.colours)[:, :2] == 0).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_every_format(tmp_path, orientation, suffix):
    from PIL import ImageOps

    upright = Image.new("RGB", (16, 8), "blue")
    upright.paste("red", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    inverse = {6: "ROTATE_90", 8: "ROTATE_270", 5: "TRANSPOSE", 7: "TRANSVERSE", 3: "ROTATE_180"}
    inverse |= {2: "FLIP_LEFT_RIGHT", 4: "FLIP_TOP_BOTTOM"}
    stored = upright
    if orientation in inverse:
        stored = upright.transpose(getattr(Image.Transpose, inverse[orientation]))
    stored.save(tmp_path / f"a.{suffix}", exif=exif, quality=100)
    read = read_image(tmp_path / f"a.{suffix}", "a")
    assert read.orientation == orientation and read.colours.size == (16, 8)
    corners = [read.colours.getpixel(place)[0] > 128 for place in ((2, 1), (13, 1), (2, 6), (13, 6))]
    assert corners == [True, False, False, False]
    again = read.turned_like(3).turned_like(orientation)
    assert again.colours.tobytes() == read.colours.tobytes()
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert read.colours.tobytes() == ImageOps.exif_transpose(image).convert("RGB").tobytes()


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        read = read_image(tmp_path / name, name)
        assert read.colours.getpixel((3, 3)) == (255, 0, 0) and read.notes == (FIRST_FRAME,)
    assert not read_image(frames[0], "a").notes


def test_the_users_own_image_is_left_as_it_is(tmp_path):
    image = Image.open(in_file(tmp_path, png(2, 1, 4, 0, [b"\x5f"], b"\0\x05")))
    image.load()
    before = (image.mode, dict(image.info), image.tobytes())
    read_image(image, "a")
    assert (image.mode, dict(image.info), image.tobytes()) == before
    array = np.full((2, 2), 0.5)
    array.setflags(write=False)
    read_image(array, "a")


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40


def test_a_format_whose_package_is_missing_is_named(tmp_path, monkeypatch):
    """Whatever the file's suffix: phones' HEIC pictures are often renamed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImportError, match=r"IMG_1\.jpg is a HEIC picture, .* Run pip install pillow-heif"):
        read_image(in_file(tmp_path, HEIC, "IMG_1.jpg"), "IMG_1.jpg")
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    with pytest.raises(ImportError, match=r"b\.avif is an AVIF picture, .* pip install --upgrade pillow"):
        read_image(in_file(tmp_path, HEIC.replace(b"ftypheic", b"ftypavif"), "b.avif"), "b.avif")


def test_pillow_heif_is_used_if_it_is_installed(tmp_path, monkeypatch):
    asked = []
    heif = types.SimpleNamespace(register_heif_opener=lambda: asked.append("heif"))
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    with pytest.raises(ValueError, match=r"a\.heic cannot be read as a picture"):
        read_image(in_file(tmp_path, HEIC, "a.heic"), "a.heic")
    assert asked == ["heif"]


def test_damaged_files_are_refused_by_name(tmp_path):
    """Cut short, or with changed bytes: read, or refused with the name, never another error."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    generator = np.random.default_rng(0)
    for suffix, refused in (("png", 0), ("jpg", 0), ("gif", 0), ("tif", 0), ("bmp", 0), ("webp", 0)):
        data = io.BytesIO()
        options = {} if suffix in ("gif", "bmp") else {"exif": exif}
        COLOURS.save(data, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix), **options)
        for _ in range(12):
            damaged = bytearray(data.getvalue())
            damaged[generator.integers(len(damaged))] ^= 255
            damaged = damaged[: generator.integers(1, len(damaged))]
            try:
                read_image(in_file(tmp_path, bytes(damaged), f"a.{suffix}"), f"a.{suffix}")
            except ValueError as error:
                refused += 1
                assert f"a.{suffix} " in str(error)
        assert refused > 3, suffix


def test_files_are_closed(tmp_path, recwarn):
    frames = [half_red(), half_red().rotate(90)]
    for name in ("a.gif", "a.tif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        read_image(tmp_path / name, name)
    frames[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert not read_image(tmp_path / "phone.jpg", "a").notes  # its second picture is a preview
    gc.collect()
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]


@pytest.mark.parametrize(
    ("name", "message"), [("gone.png", "gone.png cannot .* Check the path"), ("a.png", "Save it smaller")]
)
def test_the_remedy_fits_the_error(tmp_path, monkeypatch, name, message):
    half_red().save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / name, name)


def test_flipped_foreign_and_mapped_arrays(tmp_path):
    """As OpenCV users turn BGR into RGB, and as other libraries read 16-bit TIFF files."""
    colours = np.asarray(COLOURS)
    assert np.array_equal(numbers(read_image(colours[:, :, ::-1], "a").colours), colours[:, :, ::-1])
    assert np.array_equal(numbers(read_image(colours[::-1, ::-1], "a").colours), colours[::-1, ::-1])
    deep = WIDE.numpy().astype(">u2")
    assert np.array_equal(numbers(read_image(deep, "a").colours)[:, :, 0], numbers(GREYS))
    mapped = np.memmap(tmp_path / "a", np.uint8, "w+", shape=colours.shape)
    mapped[:] = colours
    assert np.array_equal(numbers(read_image(mapped, "a").colours), colours)


@pytest.mark.parametrize("tensor", [torch.eye(4).to_sparse(), torch.zeros(3, 4, 4, device="meta")])
def test_tensors_without_plain_numbers_are_refused(tensor):
    with pytest.raises(ValueError, match=r"a\.png must be a dense tensor that holds numbers"):
        read_image(tensor, "a.png")
