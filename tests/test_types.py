"""A type checker finds no error in the package, and finds those of a program that uses it."""

import re
import subprocess
import sys

import pytest
from helpers.installed import ROOT, Installed

pytestmark = pytest.mark.slow

# A line with a mistake names the error that mypy must find there, and in no other line.
PROGRAM = """
from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from perfusion_pytorch import (
    Concept,
    EmbeddingWrapper,
    InputCovariance,
    Rank1EditModule,
    add_concept_token_,
    calculate_input_covariance,
    concept_inputs,
    get_active_concepts,
    get_finetune_optimizer,
    global_key_lock,
    load_concept,
    loss_fn_weighted_by_mask,
    save_concept,
    set_concepts,
    tokenize_with_concept,
    train_concept,
    wrap_cross_attentions_,
)


def encode(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    return torch.randn(len(texts), 7, 4), torch.ones(len(texts), 7, dtype=torch.bool)


covariance: InputCovariance = calculate_input_covariance(["a car"], encode, ridge=1e-6)
layer = Rank1EditModule(nn.Linear(4, 3), C=covariance, is_key_proj=True)
values: Tensor = layer(torch.randn(1, 2, 4))
loss: Tensor = loss_fn_weighted_by_mask(values, values, values)
optimizer: torch.optim.Optimizer = get_finetune_optimizer(layer, lr_output=0.03)
concept: Concept = Concept.load("car.safetensors")
token: str = concept.token

pipe = StableDiffusionPipeline.from_pretrained("model")
layers: dict[str, Rank1EditModule] = wrap_cross_attentions_(pipe.unet, C=covariance)
embedding: EmbeddingWrapper = add_concept_token_(pipe.text_encoder, pipe.tokenizer, "<car-1>", "car")
ids: Tensor = tokenize_with_concept(pipe.tokenizer, ["a <car-1>"], "<car-1>")
indices: Tensor = embedding.with_superclass(ids).concept_indices
with concept_inputs(pipe.unet, text_enc_with_superclass=values, concept_indices=indices):
    pipe.unet(values)
name: str = load_concept(pipe, "car.safetensors", token="<car-2>")
set_concepts(pipe, [name], beta={name: 0.6}, temperature=0.1)
with global_key_lock(pipe):
    pipe(f"a {name}")
names: list[str] = get_active_concepts(pipe)
save_concept(pipe, "again.safetensors", dtype=torch.float32)
summary = train_concept(pipe, "pictures", token="<car-1>", superclass="car", output_dir="car")
size: int = summary.num_bytes

Rank1EditModule("to_k", C=covariance)  # arg-type
Rank1EditModule(nn.Linear(4, 3), covariance=covariance)  # call-arg
load_concept(pipe)  # call-arg
length: int = concept.token  # assignment
set_concepts(pipe, name, beta="strong")  # arg-type
train_concept(pipe, "pictures", token="<car-1>", superclass="car", output_dir="car", steps=3)  # call-arg
summary.bytes  # attr-defined
"""
CONFIG = """
[mypy]
strict = true

[mypy-diffusers.*]
follow_imports = skip
ignore_missing_imports = true
"""


def mypy(*arguments, cwd):
    """Run mypy with this repository's cache, and return its exit code and output."""
    command = [sys.executable, "-m", "mypy", "--cache-dir", ROOT / ".mypy_cache", *arguments]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    return result.returncode, result.stdout + result.stderr


def test_the_package_has_no_type_error():
    code, output = mypy(cwd=ROOT)
    assert code == 0, output


def test_types_of_an_installed_package_are_checked(tmp_path):
    installed = Installed(tmp_path)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(CONFIG)
    _, output = mypy("--python-executable", installed.python, "program.py", cwd=tmp_path)
    found = re.findall(r"^program\.py:(\d+): error: .*\[([\w-]+)\]$", output, re.MULTILINE)
    lines = PROGRAM.split("\n")
    expected = [
        (str(number), line.rpartition("  # ")[2])
        for number, line in enumerate(lines, start=1)
        if "  # " in line
    ]
    assert len(expected) == 7
    assert found == expected, output
