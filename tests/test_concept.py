"""Concepts and their files: what they hold; damaged, foreign or half-written files are refused."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import replace

import pytest
import torch
from helpers.damage import damaged_files, rewritten
from helpers.models import Attention, inputs, wrap
from helpers.real_models import MODELS
from safetensors import safe_open
from safetensors.torch import save_file

from perfusion_pytorch import Concept, Rank1EditModule, concept_inputs, wrap_cross_attentions_

D = 8


def make(seed=0, *, C=None, **changes):
    """Return a made-up concept of consistent inputs."""
    generator = torch.Generator().manual_seed(seed)
    i, s = torch.randn(2, D, generator=generator)
    inverse = torch.linalg.inv(torch.eye(D, dtype=torch.float64) if C is None else C)
    image = inverse @ i.double()
    norm = (i.double() @ image).item()
    fields = {
        "token": "<cat-1>",
        "superclass": "tabby cat",
        "base_model": "UNet2DConditionModel",
        "embeddings": {
            "text_encoder": torch.randn(6, generator=generator),
            "text_encoder_2": torch.randn(10, generator=generator),
        },
        "concept_input": i,
        "concept_dual": (image / norm).float(),
        "superclass_input": s,
        "concept_norm": norm,
        "outputs": {f"block.{n}.to_v": torch.randn(4 + n, generator=generator) for n in range(3)},
        "train_gate": (0.75, 0.1),
        "eval_gate": (0.6, 0.15),
    }
    return Concept(**{**fields, **changes})


def assert_same(one, other, dtype=torch.float32):
    for name in ("token", "superclass", "base_model", "concept_norm", "train_gate", "eval_gate"):
        assert getattr(one, name) == getattr(other, name), name
    ours, theirs = one.tensors(), other.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        kept = torch.float32 if name in ("concept_input", "concept_dual", "superclass_input") else dtype
        assert theirs[name].dtype == kept and torch.equal(tensor.to(kept), theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_file_gives_the_concept_back(tmp_path, dtype):
    concept = make()
    concept.save(tmp_path / "cat.safetensors", dtype=dtype)
    assert_same(concept, Concept.load(str(tmp_path / "cat.safetensors")), dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["cat.safetensors"]


def test_saving_again_what_was_loaded_gives_the_same_content(tmp_path):
    """The bytes may differ: safetensors writes the metadata in any order."""
    make().save(tmp_path / "first")
    Concept.load(tmp_path / "first").save(tmp_path / "second")
    assert_same(Concept.load(tmp_path / "first"), Concept.load(tmp_path / "second"), torch.float16)
    checksums = []
    for name in ("first", "second"):
        with safe_open(tmp_path / name, framework="pt") as file:
            checksums.append(json.loads(file.metadata()["perfusion_pytorch"])["sha256"])
    assert checksums[0] == checksums[1]


def test_what_viewers_of_files_read(tmp_path):
    make().save(tmp_path / "cat.safetensors")
    with safe_open(tmp_path / "cat.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["modelspec.trigger_phrase"] == "<cat-1>"
    assert (
        metadata["modelspec.title"] == "cat-1 (tabby cat)"
        and metadata["modelspec.architecture"] == "UNet2DConditionModel/perfusion"
    )
    about = json.loads(metadata["perfusion_pytorch"])
    assert (
        about["format_version"] == 2
        and about["token"] == "<cat-1>"
        and about["eval_gate"] == [0.6, 0.15]
        and len(about["sha256"]) == 64
    )


@pytest.mark.parametrize(
    "name, encoders, limit",
    [
        ("SD 1.5", {"text_encoder": 768}, 40_960),
        ("SDXL", {"text_encoder": 768, "text_encoder_2": 1280}, 250_000),
    ],
)
def test_sizes_at_the_real_shapes(tmp_path, name, encoders, limit):
    kind, options = MODELS[name]
    with torch.device("meta"):
        wrapped = wrap_cross_attentions_(kind(**options), C=None)
    d = next(iter(wrapped.values())).in_features
    i = torch.randn(d)
    Concept(
        token="<a-rather-long-token-1>",
        superclass="a superclass of many words",
        base_model=kind.__name__,
        embeddings={encoder: torch.randn(width) for encoder, width in encoders.items()},
        concept_input=i,
        concept_dual=i / (i @ i),
        superclass_input=torch.randn(d),
        concept_norm=(i @ i).item(),
        outputs={
            key: torch.randn(layer.out_features) for key, layer in wrapped.items() if not layer.is_key_proj
        },
    ).save(tmp_path / "file")
    size = (tmp_path / "file").stat().st_size
    assert 0.6 * limit < size <= limit


def trained_model(**options):
    model = Attention()
    C = torch.eye(8) + 0.3
    wrap(model, C=C, **options)
    for concept_id in range(options.get("num_concepts", 1)):
        text_enc, rest = inputs()
        with concept_inputs(model, concept_id=concept_id, **rest):
            model(text_enc)
    return model, C.double()


def test_a_concept_of_a_trained_model(assert_near):
    model, C = trained_model(num_concepts=2, train_beta=0.5)
    row = torch.randn(6, dtype=torch.float16)
    concept = Concept.of_model(
        model, token="<dog-1>", superclass="dog", embeddings={"text_encoder": row}, concept_id=1
    )
    layer = model.first["to_v"]
    i = layer.concept_input[1, 0].double()
    assert torch.equal(concept.concept_input, layer.concept_input[1, 0]) and torch.equal(
        concept.concept_dual, layer.concept_dual[1]
    )
    assert torch.equal(concept.superclass_input, layer.superclass_input[1, 0])
    assert concept.concept_norm == pytest.approx((i @ torch.linalg.solve(C, i)).item(), rel=1e-6)
    assert sorted(concept.outputs) == ["first.to_v", "second.to_v"]
    assert torch.equal(concept.outputs["second.to_v"], model.second["to_v"].concept_output[1])
    assert (
        concept.train_gate == (0.5, 0.1)
        and concept.eval_gate == (0.7, 0.15)
        and concept.base_model == "Attention"
    )
    layer.concept_output.data.zero_()
    assert concept.outputs["first.to_v"].any()  # a copy


def test_inputs_of_several_slots_are_their_mean():
    model, _ = trained_model(num_finetune_prompts=3)
    layer = model.first["to_v"]
    text_enc, rest = inputs()
    with concept_inputs(model.train(), prompt_ids=torch.tensor([1, 1]), **rest):
        model(text_enc)
    concept = Concept.of_model(
        model, token="<dog-1>", superclass="dog", embeddings={"text_encoder": torch.ones(2)}
    )
    assert torch.allclose(concept.concept_input, layer.concept_input[0, :2].mean(dim=0))
    assert torch.allclose(concept.superclass_input, layer.superclass_input[0, :2].mean(dim=0))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda model: model.second["to_v"].initialized.zero_(), r"'second\.to_v' has never seen concept 0"),
        (
            lambda model: model.second["to_v"].concept_input.add_(0.1),
            r"`concept_input` must be the same.*'first\.to_k' and 'second\.to_v'",
        ),
        (
            lambda model: model.second["to_k"].superclass_input.add_(0.1),
            "`superclass_input` must be the same in all layers",
        ),
        (
            lambda model: model.first["to_v"].concept_output.data.fill_(torch.nan),
            r"'output\.first\.to_v' must be finite",
        ),
        (
            lambda model: [
                setattr(m, "covariance", None) for m in model.modules() if isinstance(m, Rank1EditModule)
            ],
            "made with C=None",
        ),
    ],
)
def test_a_model_whose_concept_cannot_be_saved(change, message):
    model, _ = trained_model()
    with torch.no_grad():
        change(model)
    with pytest.raises(ValueError, match=message):
        Concept.of_model(model, token="<dog-1>", superclass="dog", embeddings={"text_encoder": torch.ones(2)})


def test_a_model_that_is_not_wrapped():
    with pytest.raises(ValueError, match="Attention has no wrapped value layer"):
        Concept.of_model(
            Attention(), token="<dog-1>", superclass="dog", embeddings={"text_encoder": torch.ones(2)}
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"token": "<Cat>"}, "`token` must be one lower-case word"),
        ({"token": "a cat"}, "`token` must be one lower-case word"),
        ({"superclass": " "}, "`superclass` must be a text that is not empty"),
        ({"embeddings": {}}, "`embeddings` must hold at least one tensor"),
        (
            {"embeddings": {"text_encoder": torch.ones(2, 3)}},
            r"'embedding\.text_encoder' must have shape \(features,\), got \(2, 3\)",
        ),
        (
            {"outputs": {"a": torch.ones(3, dtype=torch.int64)}},
            r"'output\.a' must be float16, bfloat16 or float32, got torch\.int64",
        ),
        (
            {"superclass_input": torch.ones(9)},
            r"'superclass_input' must have shape \(8,\), as concept_input has, got \(9,\)",
        ),
        ({"superclass_input": torch.full((8,), torch.inf)}, "'superclass_input' must be finite"),
        ({"concept_dual": torch.zeros(8)}, "'concept_dual' must be the dual of 'concept_input'.*got 0"),
        ({"concept_norm": 0.0}, "`concept_norm` must be finite and above 0"),
        ({"eval_gate": (0.7, 0.0)}, "`eval_gate` must be .* τ above 0"),
        ({"train_gate": (0.7,)}, "`train_gate` must be"),
    ],
)
def test_a_concept_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_number_too_large_for_half_precision(tmp_path):
    concept = make(outputs={"a": torch.tensor([1e6])})
    with pytest.raises(ValueError, match=r"'output\.a' must fit into torch\.float16.*float32"):
        concept.save(tmp_path / "file")
    assert not list(tmp_path.iterdir())
    concept.save(tmp_path / "file", dtype=torch.float32)


def test_equal_tensors_make_the_same_concept():
    concept = make(1)
    assert concept.has_equal_tensors(replace(concept, token="<other>", eval_gate=(0.1, 0.2)))
    outputs = {name: output + 1 for name, output in concept.outputs.items()}
    assert not concept.has_equal_tensors(replace(concept, outputs=outputs))
    assert not concept.has_equal_tensors(replace(concept, outputs={"another": torch.ones(3)}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"about": lambda a: a | {"format_version": 3}}, "`format_version` must be at most 2, got 3. Update"),
        ({"about": lambda a: a | {"concept_norm": None}}, "`concept_norm` must be finite"),
        ({"about": lambda a: a | {"concept_norm": 10**400}}, "cannot be used as a concept file"),
        ({"about": lambda a: a | {"dim": 9}}, "`dim` must be [0-9]+, the width of its inputs, got 9"),
        ({"about": lambda a: a | {"train_gate": 3}}, "cannot be used as a concept file"),
        ({"about": lambda a: {k: v for k, v in a.items() if k != "token"}}, "`token` must be a text"),
        ({"tensors": lambda t: t | {"more": torch.ones(2)}}, r"\['more'\] are unknown"),
        (
            {"tensors": lambda t: {k: v for k, v in t.items() if k != "concept_dual"}},
            r"\['concept_dual'\] are missing",
        ),
        (
            {"tensors": lambda t: {k: v for k, v in t.items() if not k.startswith("output")}},
            "`outputs` must hold at least one",
        ),
        (
            {"tensors": lambda t: t | {"output.block.0.to_v": torch.full((4,), torch.nan)}},
            r"'output\.block\.0\.to_v' must be finite",
        ),
        (
            {"tensors": lambda t: t | {"concept_input": t["concept_input"].half()}},
            "'concept_input' must be float32, got torch.float16",
        ),
    ],
)
def test_a_file_that_was_signed_but_is_wrong(tmp_path, changes, message):
    path = tmp_path / "file.safetensors"
    make().save(path)
    rewritten(path, **changes, is_signed=True)
    with pytest.raises(
        ValueError, match=rf"file\.safetensors cannot be used as a concept file.*{message}|{message}"
    ):
        Concept.load(path)


def test_no_damaged_file_is_ever_loaded(tmp_path):
    whole, damaged = tmp_path / "cat.safetensors", tmp_path / "damaged.safetensors"
    make().save(whole)
    cases = 0
    for what, content in damaged_files(whole, random.Random(0)):
        if content == whole.read_bytes():
            continue
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged\.safetensors"):
            Concept.load(damaged)
            pytest.fail(what)
        cases += 1
    assert cases >= 500, cases
    assert_same(make(), Concept.load(whole), torch.float16)


def test_what_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no concept file"):
        Concept.load(tmp_path / "missing")
    with pytest.raises(ValueError, match="got a folder"):
        Concept.load(tmp_path)
    path = tmp_path / "deep.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata={"perfusion_pytorch": "[" * 200_000})
    with pytest.raises(ValueError, match="cannot be used as a concept file"):
        Concept.load(path)


def save_in_turn(path):
    while True:
        for seed in (1, 2):
            make(seed).save(path)


@pytest.mark.slow
def test_a_kill_while_saving_leaves_one_whole_file(tmp_path):
    path, rng = tmp_path / "cat.safetensors", random.Random(0)
    make(1).save(path)
    wanted = {seed: make(seed).concept_input.half().float() for seed in (1, 2)}
    for _ in range(40):
        process = multiprocessing.get_context("fork").Process(target=save_in_turn, args=(path,))
        process.start()
        time.sleep(rng.uniform(0.005, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = Concept.load(path).concept_input.half().float()
        assert any(torch.equal(found, value) for value in wanted.values())


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, at):
    path = tmp_path / "cat.safetensors"
    make(1).save(path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, at, full)
    with pytest.raises(OSError, match="No space left"):
        make(2).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
