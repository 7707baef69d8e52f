"""The small model as a pipeline, and concept files for it."""

import pytest
import torch
from helpers.small_model import make_pipe, train

from perfusion_pytorch import save_concept


@pytest.fixture
def pipe():
    return make_pipe()


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Concept files: a car, a bear of two words, another car under the same token."""
    folder = tmp_path_factory.mktemp("concepts")
    for name, token, superclass, seed in (
        ("car", "<car-1>", "car", 1),
        ("bear", "<bear-1>", "teddy bear", 2),
        ("twin", "<car-1>", "car", 3),
    ):
        trained = make_pipe()
        train(trained, token, superclass, seed)
        save_concept(trained, folder / f"{name}.safetensors", dtype=torch.float32)
    return folder
