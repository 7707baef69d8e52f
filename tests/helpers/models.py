"""Small models with cross attentions, for the tests of wiring."""

import torch
from torch import nn

from perfusion_pytorch import Rank1EditModule, wrap_cross_attentions_

NAMES = [
    f"{block}.transformer_blocks.0.attn2.{projection}"
    for block in (
        "down_blocks.0.attentions.0",
        "mid_block.attentions.0",
        "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1",
    )
    for projection in ("to_k", "to_v")
]


def make_unet(**options):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        **options,
    )


def run(unet, text_enc):
    generator = torch.Generator().manual_seed(1)
    return unet(torch.randn(len(text_enc), 4, 8, 8, generator=generator), 3, text_enc).sample


class Attention(nn.Module):
    """Two cross attentions of a model that is not diffusers'."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleDict({"to_k": nn.Linear(8, 6), "to_v": nn.Linear(8, 6)})
        self.second = nn.ModuleDict(
            {"to_k": nn.Linear(8, 6), "to_v": nn.Linear(8, 6), "to_out": nn.Linear(6, 6)}
        )

    def forward(self, text_enc):
        keys, values = (self.first[name](text_enc) + self.second[name](text_enc) for name in ("to_k", "to_v"))
        return torch.tanh(keys) * values


def wrap(model, C=None, **options):
    return wrap_cross_attentions_(
        model, C=torch.eye(8) if C is None else C, key_names=["to_k"], value_names=["to_v"], **options
    )


def inputs(b=2, n=5, d=8):
    """Return (text_enc, keyword arguments for `concept_inputs`)."""
    return torch.randn(b, n, d), {
        "text_enc_with_superclass": torch.randn(b, n, d),
        "concept_indices": torch.randint(0, n, (b,)),
    }


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state):
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, Rank1EditModule)]
