"""Optional packages: what is missing is named, by its name on the index, and nothing else."""

import sys

import pytest

from perfusion_pytorch.extras import required


@pytest.mark.parametrize(
    ("name", "blocked", "packages"),
    [
        ("PIL.Image", ["PIL", "PIL.Image"], "pillow"),
        ("matplotlib.figure", ["matplotlib", "matplotlib.figure"], "matplotlib"),
        ("peft", ["peft"], "peft"),
        ("diffusers", ["diffusers", "accelerate", "tqdm"], "diffusers accelerate tqdm"),
        ("gradio", ["gradio"], "gradio"),
    ],
)
def test_the_missing_packages_are_named(monkeypatch, name, blocked, packages):
    for module in blocked:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"^This needs {name} \(.*\)\. Run pip install {packages}\.$"):
        required(name)


def test_where_none_is_missing_they_do_not_fit_each_other():
    with pytest.raises(
        ImportError, match="Run pip install --upgrade diffusers transformers accelerate pillow"
    ):
        required("diffusers.of_another_version")


def test_what_is_there_is_returned():
    assert required("tqdm") is sys.modules["tqdm"]
