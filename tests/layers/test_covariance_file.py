"""Covariance files: damage is found, and files from before there were checksums still load."""

import json
import random

import pytest
import torch
from helpers.damage import cut_or_flipped
from safetensors import safe_open
from safetensors.torch import save_file

from perfusion_pytorch import InputCovariance
from perfusion_pytorch.files import write_atomically
from perfusion_pytorch.layers.covariance_file import covariance_bytes, read_covariance


@pytest.fixture
def estimate(covariance):
    return InputCovariance(covariance(8), num_tokens=1500, ridge=1e-6)


@pytest.mark.parametrize("key", [None, "what it is of"], ids=["saved", "cached"])
def test_no_damaged_file_is_ever_loaded(estimate, tmp_path, key):
    path = tmp_path / "c.safetensors"
    whole = covariance_bytes(estimate.matrix, {"num_tokens": 1500, "ridge": 1e-6}, key=key)
    for what, content in cut_or_flipped(whole, random.Random(0), 300):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be used as a covariance file: ") as caught:
            InputCovariance.load(path)
        assert type(caught.value) is ValueError and str(path) in str(caught.value), what
    path.write_bytes(whole)
    assert torch.equal(InputCovariance.load(path).matrix, estimate.matrix)


def test_a_flip_that_leaves_the_meaning_is_damage_too(estimate, tmp_path):
    path = tmp_path / "c.safetensors"
    estimate.save(path)
    whole = path.read_bytes()
    for old, new in (
        (b"1e-06", b"1E-06"),
        (b"input_covariance", b"input_covarianca"),
        (b"sha256", b"sha257"),
    ):
        assert whole.count(old) == 1
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match=r"was damaged or changed|hold no facts|got \['sha257'\] too"):
            InputCovariance.load(path)


def unsigned(path, matrix, **metadata):
    save_file({"covariance": matrix.contiguous()}, path, metadata=metadata or None)
    return path


def test_files_without_a_checksum_still_load(estimate, tmp_path):
    """As `save` wrote them before, and as others write them, with metadata of their own or none."""
    matrix = estimate.matrix.float()
    about = json.dumps({"num_tokens": 17, "ridge": 0.25})
    old = InputCovariance.load(unsigned(tmp_path / "c", matrix, format="pt", input_covariance=about))
    assert (old.num_tokens, old.ridge) == (17, 0.25) and torch.allclose(old.matrix, estimate.matrix)
    for metadata in ({}, {"what": "a second moment", "source": "elsewhere"}):
        other = InputCovariance.load(unsigned(tmp_path / "c", matrix, **metadata))
        assert (other.num_tokens, other.ridge) == (1, 0.0) and torch.equal(other.matrix, matrix.double())


def test_damage_to_a_file_without_a_checksum_is_found_where_it_breaks_the_symmetry(estimate, tmp_path):
    """In the lower bits, and on the diagonal, it cannot be told from another covariance."""
    matrix = estimate.matrix.float()
    whole = unsigned(tmp_path / "c", matrix).read_bytes()
    refused = 0
    for _, content in cut_or_flipped(whole, random.Random(0), 300):
        (tmp_path / "c").write_bytes(content)
        try:
            error = (InputCovariance.load(tmp_path / "c").matrix - matrix).fill_diagonal_(0).abs().max()
            assert error < 1e-3
        except ValueError as refusal:
            assert "cannot be used as a covariance file: " in str(refusal)
            refused += 1
    assert refused > 450


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.new_full((8, 8), torch.nan), "must be finite and symmetric"),
        (lambda m: m + torch.ones(8, 8).triu(1), "must be finite and symmetric"),
        (lambda m: m[:, :4], r"of shape \(d, d\), got torch.float32 of shape \(8, 4\)"),
        (lambda m: m.int(), "must be floating point numbers"),
    ],
)
def test_what_cannot_be_a_covariance(estimate, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        InputCovariance.load(unsigned(tmp_path / "c", change(estimate.matrix.float())))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_tokens": 0}, "'num_tokens' must be at least 1"),
        ({"num_tokens": True}, "'num_tokens' must be at least 1"),
        ({"ridge": "0.1"}, "'ridge' at least 0, got"),
        ({"ridge": -1.0}, "'ridge' at least 0, got"),
        ({"rigde": 0.1}, r"alone, got \['rigde'\] too"),
    ],
)
def test_facts_that_cannot_be(estimate, tmp_path, facts, message):
    path = unsigned(tmp_path / "c", estimate.matrix.float(), input_covariance=json.dumps(facts))
    with pytest.raises(ValueError, match=message):
        InputCovariance.load(path)


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no covariance file .*none"):
        InputCovariance.load(tmp_path / "none")
    with pytest.raises(ValueError, match="must be a covariance file, got a folder"):
        InputCovariance.load(tmp_path)
    save_file({"covariance": torch.eye(2), "other": torch.eye(2)}, tmp_path / "c")
    with pytest.raises(ValueError, match="named 'covariance' alone, but it holds"):
        InputCovariance.load(tmp_path / "c")


def test_a_cached_file_is_that_of_its_key(estimate, tmp_path):
    data = covariance_bytes(estimate.matrix, {"num_tokens": 1500, "ridge": 1e-6}, key="a")
    write_atomically(tmp_path / "c", data)
    with safe_open(tmp_path / "c", framework="pt") as file:
        assert set(file.metadata()) == {"format", "input_covariance", "perfusion_covariance"}

    assert read_covariance(data, key="a")[1] == {"num_tokens": 1500, "ridge": 1e-6}
    with pytest.raises(ValueError, match="of another text encoder or of other captions"):
        read_covariance(data, key="b")
    with pytest.raises(ValueError, match="hold no facts under 'perfusion_covariance'"):
        read_covariance(covariance_bytes(estimate.matrix, {"num_tokens": 1, "ridge": 0.0}), key="a")


@pytest.mark.parametrize("scale", [1e300, 1e-300, 1.0])
def test_numbers_beyond_float32_are_saved(covariance, tmp_path, scale):
    matrix = covariance(4)
    InputCovariance(matrix * scale).save(tmp_path / "c")
    loaded = InputCovariance.load(tmp_path / "c").matrix / scale
    assert torch.allclose(loaded, matrix, rtol=1e-5, atol=1e-6)
    with safe_open(tmp_path / "c", framework="pt") as file:
        assert file.get_tensor("covariance").dtype == (torch.float32 if scale == 1 else torch.float64)
