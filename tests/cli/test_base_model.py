"""Where a base model comes from: a folder, the hub, or one file; and the device that it runs on."""

from argparse import Namespace

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from helpers.small_model import MODEL, make_pipe
from helpers.tiny_pipes import tiny_pipe
from safetensors.torch import save_file

from perfusion_pytorch.cli.base_model import captions_of, check_concepts, device_of, load_pipeline

SD = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(320, 4, 3, 3)}
SDXL = SD | {"conditioner.embedders.1.model.ln_final.weight": torch.ones(1)}


def flags(name, **given):
    given = {"revision": None, "variant": None} | given
    return Namespace(pretrained_model_name_or_path=str(name), **given)


@pytest.mark.parametrize(
    ("weights", "kind"), [(SD, StableDiffusionPipeline), (SDXL, StableDiffusionXLPipeline)]
)
def test_a_model_of_one_file(monkeypatch, tmp_path, weights, kind):
    seen = []

    def load(cls, path, **options):
        seen.append((cls, path, options))
        return make_pipe()

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", classmethod(load))
    monkeypatch.setattr(StableDiffusionXLPipeline, "from_single_file", classmethod(load))
    save_file(weights, tmp_path / "model.safetensors")
    pipe = load_pipeline(flags(tmp_path / "model.safetensors"), dtype=torch.float32, device="cpu")
    assert isinstance(pipe, StableDiffusionPipeline)
    assert seen == [(kind, str(tmp_path / "model.safetensors"), {"torch_dtype": torch.float32})]


def test_a_file_that_holds_no_model(tmp_path):
    for name, message in (
        ("m.ckpt", r"must be a .safetensors file, got .*m.ckpt. Others, such as .ckpt, can run"),
        ("m.safetensors", "must be a whole safetensors file, but it cannot be read"),
    ):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(ValueError, match=message):
            load_pipeline(flags(tmp_path / name), dtype=torch.float32, device="cpu")
    save_file({"lora.down.weight": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"with weights under 'model.diffusion_model.', but it holds none"):
        load_pipeline(flags(tmp_path / "m.safetensors"), dtype=torch.float32, device="cpu")


def test_a_model_of_one_file_without_a_network(tmp_path):
    save_file(SD, tmp_path / "m.safetensors")
    with pytest.raises(
        ValueError, match=r"cannot be loaded as a .*connect to the network, or give"
    ) as caught:
        load_pipeline(flags(tmp_path / "m.safetensors"), dtype=torch.float32, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "given", "flag"),
    [(MODEL, {"revision": "main"}, "--revision"), ("file", {"variant": "fp16"}, "--variant")],
)
def test_flags_for_the_hub_are_refused_where_the_model_is_here(tmp_path, name, given, flag):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"`{flag}` chooses among files on the model hub"):
        load_pipeline(flags(tmp_path / name, **given), dtype=torch.float32, device="cpu")


def test_loading_warns_of_no_deprecation_of_our_own(recwarn):
    load_pipeline(flags(MODEL), dtype=torch.float32, device="cpu")
    assert [str(warning.message) for warning in recwarn] == []


def test_the_folder_of_a_training_run_names_its_concept(run, concepts, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "concept.safetensors").write_bytes((concepts / "car.safetensors").read_bytes())
    code, out, err = run("info", tmp_path / "run")
    assert (code, err) == (0, "") and out.startswith(f"{tmp_path / 'run' / 'concept.safetensors'}: the conc")
    args = Namespace(concept=[tmp_path / "run", concepts / "bear.safetensors"])
    check_concepts(args)
    assert args.concept == [tmp_path / "run" / "concept.safetensors", concepts / "bear.safetensors"]


def test_a_concept_file_is_named_once(concepts):
    path = concepts / "car.safetensors"
    with pytest.raises(ValueError, match=r"`--concept` must name each file once, got .*car.*twice"):
        check_concepts(Namespace(concept=[path, path.parent / "." / ".." / path.parent.name / path.name]))


@pytest.mark.parametrize("name", ["cuda:77", "tpu", "meta:x", ""])
def test_a_device_that_is_not_there(run, name):
    code, out, err = run(
        "covariance", "--pretrained_model_name_or_path", MODEL, "--device", name, "--num_captions", 1
    )
    assert (code, out) == (1, "") and len(err.splitlines()) == 1
    assert f"--device must be one that this machine has, got {name!r} (" in err and "It has " in err


def test_devices():
    assert device_of(Namespace(device="cpu")) == torch.device("cpu")
    assert device_of(Namespace(device=None)).type in ("cpu", "cuda", "mps")


def test_captions(captions):
    def found(**flags):
        return captions_of(Namespace(**flags), tiny_pipe())

    assert len(found(captions=captions, num_captions=None)) == 75
    assert found(captions=captions, num_captions=2) == captions.read_text().split("\n")[:2]
    assert len(found(captions=None, num_captions=4)) == 4
    with pytest.warns(UserWarning, match=r"--num_captions is 1,000, but .*captions.txt holds 75"):
        assert len(found(captions=captions, num_captions=1000)) == 75


def test_a_caption_file_that_is_missing_is_told_before_the_model_is_loaded(run, tmp_path):
    code, out, err = run(
        "covariance", "--pretrained_model_name_or_path", "x/y", "--captions", tmp_path / "none"
    )
    assert (code, out) == (1, "") and f"There is no caption file {tmp_path / 'none'}. Give a text file" in err
