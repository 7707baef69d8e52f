"""A wheel holds the whole package, and works from an ordinary install."""

import json

import pytest
from helpers.installed import ROOT, Installed

import perfusion_pytorch

CONCEPT = ROOT / "examples" / "shapes" / "concepts" / "car.safetensors"
LAYER = """
import torch
from torch import nn
import perfusion_pytorch

layer = perfusion_pytorch.Rank1EditModule(nn.Linear(4, 3), C=torch.eye(4))
layer(torch.randn(1, 2, 4), torch.randn(1, 2, 4), torch.tensor([1])).sum().backward()
assert layer.concept_output.grad is not None
print(perfusion_pytorch.__file__, perfusion_pytorch.__version__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_a_wheel_holds_every_module_and_the_marker_of_types(installed):
    package = ROOT / "perfusion_pytorch"
    expected = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    files = installed.files()
    assert expected | {"perfusion_pytorch/py.typed"} == {
        name for name in files if name.startswith("perfusion_pytorch/")
    }
    assert not [name for name in files if name.startswith(("tests", "examples", "benchmarks", "docs"))]
    assert f"-{perfusion_pytorch.__version__}-" in installed.wheel.name


def test_the_layer_runs_from_the_install(installed):
    file, version = installed.check(installed.python, "-c", LAYER).split()
    assert file.startswith(str(installed.folder)) and version == perfusion_pytorch.__version__


def test_the_command_runs_from_the_install(installed):
    command = installed.scripts / "perfusion"
    assert installed.check(command, "--help").startswith("usage: perfusion")
    facts = json.loads(installed.check(command, "info", CONCEPT, "--json"))
    assert (facts["token"], facts["superclass"]) == ("<car-1>", "car")
