"""Where a concept comes from: in its file, and from the pipeline."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.real_models import MODELS
from helpers.small_model import MODEL, make_pipe, train
from helpers.tiny_concepts import tiny_concept
from helpers.tiny_pipes import tiny_pipe

from perfusion_pytorch import Concept, load_concept, save_concept, wrap_cross_attentions_
from perfusion_pytorch.pipelines.origin import base_model_facts
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.training.outcome import ELSEWHERE

ORIGIN = {"base_model_name": "someone/some-model", "training": {"max_train_steps": 4, "betas": [0.9, 0.999]}}


def test_the_origin_is_in_the_file_and_survives_loading_and_saving(tmp_path):
    pipe = tiny_pipe()
    replace(tiny_concept(pipe), origin=ORIGIN).save(tmp_path / "a")
    assert Concept.load(tmp_path / "a").origin == ORIGIN
    load_concept(pipe, tmp_path / "a")
    save_concept(pipe, tmp_path / "b")
    assert Concept.load(tmp_path / "b").origin == ORIGIN


def test_older_files_are_read_and_say_nothing_of_it():
    for name in ("car", "house"):
        assert Concept.load(MODEL.parent / "concepts" / f"{name}.safetensors").origin == {}


@pytest.mark.parametrize("origin", [{"a": {1, 2}}, {"a": float("nan")}, [1], "a model"])
def test_an_origin_that_json_cannot_hold_is_refused(origin):
    concept = tiny_concept(tiny_pipe())
    with pytest.raises(ValueError, match="`origin` must be a mapping that JSON can hold, got"):
        replace(concept, origin=origin)


def test_the_file_of_stable_diffusion_stays_below_its_limit_with_all_settings(tmp_path):
    kind, options = MODELS["SD 1.5"]
    with torch.device("meta"):
        wrapped = wrap_cross_attentions_(kind(**options), C=None)
    i = torch.randn(768)
    recorded = TrainingOptions(
        images="a", token="<a>", superclass="a", output_dir="a", learning_rate=0.123456789
    ).recorded
    settings = {name: value for name, value in recorded.items() if name not in ELSEWHERE}
    settings |= dict.fromkeys(["pictures", "masks", "prompts", "resolution", "max_train_steps"], 1000)
    settings |= {"mixed_precision": "fp16", "rows of a step": 16, "model": 16 * "a"}
    Concept(
        token="<a-rather-long-token-1>",
        superclass="a superclass of many words",
        base_model=kind.__name__,
        embeddings={"text_encoder": torch.randn(768)},
        concept_input=i,
        concept_dual=i / (i @ i),
        superclass_input=torch.randn(768),
        concept_norm=1.0,
        outputs={
            key: torch.randn(layer.out_features) for key, layer in wrapped.items() if not layer.is_key_proj
        },
        origin={
            "base_model_name": "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "base_model_revision": 40 * "a",
            "training": settings,
        },
    ).save(tmp_path / "file")
    assert (tmp_path / "file").stat().st_size <= 40_960


def test_a_pipeline_of_a_folder_has_the_folders_name_and_no_path(tmp_path):
    pipe = make_pipe()
    assert base_model_facts(pipe) == {"base_model_name": "tiny-sd"}
    train(pipe, "<car-1>", "car")
    save_concept(pipe, tmp_path / "a")
    assert Concept.load(tmp_path / "a").origin == {"base_model_name": "tiny-sd"}
    assert base_model_facts(tiny_pipe()) == {}


def test_a_pipeline_of_the_hub_has_its_name_and_commit(hub):
    files = {str(path.relative_to(MODEL)): path.read_bytes() for path in MODEL.rglob("*") if path.is_file()}
    commit = hub.add("someone/tiny-sd", files, tag="v1")
    hub.add("someone/tiny-sd", {"README.md": b"newer"})
    for revision in ("v1", commit):
        pipe = DiffusionPipeline.from_pretrained("someone/tiny-sd", revision=revision)
        assert base_model_facts(pipe) == {"base_model_name": "someone/tiny-sd", "base_model_revision": commit}
    assert Path(pipe.unet.config["_name_or_path"]).name == "unet"


def test_a_name_that_is_no_path_is_kept():
    pipe = tiny_pipe()
    pipe.register_to_config(_name_or_path="someone/elsewhere")
    assert base_model_facts(pipe) == {"base_model_name": "someone/elsewhere"}
