"""Fixtures for all tests: one thread (the tensors are tiny), a seed, one tolerance for each dtype."""

import pytest
import torch

# The largest error allowed, relative to the largest magnitude that is expected.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def pytest_configure():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def assert_near():
    """Return a check that a tensor is near an expected one, within the tolerance of its dtype.

    `dtype` is a coarser one that it was computed in.
    """

    def check(actual, expected, dtype=None):
        assert actual.shape == expected.shape
        expected = expected.detach().double()
        scale = expected.abs().max().clamp_min(1e-30).item() if expected.numel() else 1.0
        error = (actual.detach().double() - expected).abs().max().item() / scale
        assert error <= TOLERANCE[dtype or actual.dtype], f"relative error {error:.1e}"

    return check


@pytest.fixture
def covariance():
    """Return a function that makes a well-conditioned covariance of a width, in float64."""

    def make(d):
        encodings = torch.randn(4 * d, d, dtype=torch.float64) @ (
            torch.randn(d, d, dtype=torch.float64) / d**0.5 + torch.eye(d)
        )
        return encodings.T @ encodings / len(encodings)

    return make


@pytest.fixture
def run(capsys):
    """Return a function that runs a command line of `perfusion`: its exit code, output and errors."""
    from perfusion_pytorch.cli.main import main

    def run_command(*argv):
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run_command


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the model hub, which the real client takes for the hub; see `helpers.hub_server`."""
    from helpers.hub_server import hub_server, use_server
    from huggingface_hub import utils

    with hub_server() as server:
        use_server(monkeypatch, server, tmp_path / "hf")
        yield server
    utils.close_session()


@pytest.fixture
def captions(tmp_path):
    """Return a file of 75 captions of words that the small model knows."""
    colours, path = ("red", "blue", "yellow", "white", "green"), tmp_path / "captions.txt"
    lines = [
        f"a photo of a {a} {noun} on a {b} background"
        for a in colours
        for b in colours
        for noun in ("car", "bear", "house")
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def concepts(tmp_path_factory):
    """A folder with concept files of a car and of a teddy bear."""
    from helpers.small_model import make_pipe, train

    from perfusion_pytorch import save_concept

    folder = tmp_path_factory.mktemp("concepts")
    for name, token, superclass, seed in (
        ("car", "<car-1>", "car", 1),
        ("bear", "<bear-1>", "teddy bear", 2),
    ):
        pipe = make_pipe()
        train(pipe, token, superclass, seed)
        save_concept(pipe, folder / f"{name}.safetensors", dtype=torch.float32)
    return folder
