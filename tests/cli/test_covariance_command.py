"""`perfusion covariance` on the small model."""

import pytest
import torch
from diffusers import StableDiffusionPipeline
from helpers.small_model import MODEL

from perfusion_pytorch import InputCovariance
from perfusion_pytorch.pipelines.covariance_cache import covariance_path
from perfusion_pytorch.pipelines.model_notes import NOTES_FILE

WITH_MODEL = ["--pretrained_model_name_or_path", str(MODEL)]


@pytest.mark.slow
def test_covariance_is_computed_then_found_and_written(run, captions, tmp_path):
    flags = [
        "covariance",
        *WITH_MODEL,
        "--captions",
        captions,
        "--cache_dir",
        tmp_path / "cache",
        "--device",
        "cpu",
    ]
    code, out, err = run(*flags, "--batch_size", "25", "--output", tmp_path / "c.safetensors")
    assert code == 0 and "covariance: " in err and "/3 " in err  # the bar
    assert out.startswith("Input covariance of 1,500 tokens of 75 captions, computed in ")
    (cached,) = (tmp_path / "cache").iterdir()
    assert str(cached) in out and str(tmp_path / "c.safetensors") in out and "with a ridge of 1e-06" in out
    written, held = InputCovariance.load(tmp_path / "c.safetensors"), InputCovariance.load(cached)
    assert torch.allclose(written.matrix, held.matrix, rtol=1e-6) and written.ridge == held.ridge
    code, out, err = run(*flags, "--no_progress")
    assert (code, err) == (0, "") and "found in the cache" in out
    cached.write_bytes(b"damaged")
    code, out, err = run(*flags, "--no_progress")
    assert code == 0 and "is damaged" in err and ", computed in " in out


def test_covariance_with_other_settings(run, captions, tmp_path):
    flags = [
        "covariance",
        *WITH_MODEL,
        "--captions",
        captions,
        "--cache_dir",
        tmp_path / "cache",
        "--device",
        "cpu",
        "--no_progress",
    ]
    code, out, err = run(*flags, "--num_captions", "10", "--ridge", "0.001", "--dtype", "bfloat16")
    assert (code, err) == (0, "") and "200 tokens of 10 captions" in out and "ridge of 0.001" in out
    first = captions.read_text().splitlines()[:10]
    where = {"cache_dir": tmp_path / "cache", "ridge": 0.001}
    (path,) = (tmp_path / "cache").iterdir()
    for dtype in (torch.float32, torch.bfloat16):
        pipe = StableDiffusionPipeline.from_pretrained(MODEL, torch_dtype=dtype)
        assert (path == covariance_path(pipe, first, **where)) == (dtype == torch.bfloat16)


def test_built_in_captions_need_a_model_of_everyday_words(run, tmp_path):
    model = tmp_path / "model"  # without the notes that name captions
    model.mkdir()
    for path in MODEL.iterdir():
        if path.name != NOTES_FILE:
            (model / path.name).symlink_to(path)
    code, out, err = run(
        *("covariance", "--pretrained_model_name_or_path", model, "--cache_dir", tmp_path),
        *("--num_captions", "300", "--device", "cpu"),
    )
    assert (code, out) == (1, "") and "by `--captions FILE`" in err and len(err.splitlines()) == 1


def test_captions_of_fewer_tokens_than_features_are_a_warning(run, captions, tmp_path):
    flags = ["--captions", captions, "--cache_dir", tmp_path, "--device", "cpu", "--no_progress"]
    code, out, err = run("covariance", *WITH_MODEL, *flags, "--num_captions", "1")
    assert code == 0 and "20 tokens of 1 caption, " in out
    assert err.startswith(
        "perfusion: warning: 20 tokens cannot fill 160 dimensions, so the covariance measures"
    )
    assert run("covariance", *WITH_MODEL, *flags, "--num_captions", "8")[2] == ""  # 160
