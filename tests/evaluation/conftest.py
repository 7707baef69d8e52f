"""Tiny models that measure, tiny files to be measured, and a pipeline for them."""

import pytest
import torch
from helpers.tiny_concepts import tiny_concept
from helpers.tiny_judges import save_clip, save_dino
from helpers.tiny_pipes import tiny_pipe
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("judges") / "clip")


@pytest.fixture(scope="session")
def dino(tmp_path_factory):
    return save_dino(tmp_path_factory.mktemp("judges") / "dino")


@pytest.fixture
def pipe():
    return tiny_pipe()


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with a concept, LoRAs of diffusers and of peft, and textual inversions, for the pipeline."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("made")
    pipe = tiny_pipe()
    tiny_concept(pipe).save(folder / "mine.safetensors")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["attn2.to_k", "attn2.to_v"])
    pipe.unet.add_adapter(config, adapter_name="new")
    generator = torch.Generator().manual_seed(3)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    state = get_peft_model_state_dict(pipe.unet, adapter_name="new")
    pipe.save_lora_weights(
        folder / "diffusers",
        convert_state_dict_to_diffusers(state),
        unet_lora_adapter_metadata=pipe.unet.peft_config["new"].to_dict(),
    )
    wrapped = get_peft_model(tiny_pipe().unet, config)
    wrapped.load_state_dict(
        {f"base_model.model.{name.replace('.weight', '.default.weight')}": t for name, t in state.items()},
        strict=False,
    )
    wrapped.save_pretrained(folder / "peft")
    rows = torch.randn(2, 12, generator=generator)
    save_file({"<my-car>": rows[:1].clone()}, folder / "inversion.safetensors")
    save_file({"emb_params": rows}, folder / "two-rows.safetensors")
    return folder
