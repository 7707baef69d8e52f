"""One thread (the tensors are tiny), a seed before each test, and the one tolerance of each dtype."""

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
    """Return a check that a tensor meets an expected one within the tolerance of its dtype, or of a coarser one that made it."""

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
        encodings = torch.randn(4 * d, d, dtype=torch.float64) @ (torch.randn(d, d, dtype=torch.float64) / d**0.5 + torch.eye(d))
        return encodings.T @ encodings / len(encodings)

    return make
