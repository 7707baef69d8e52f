"""What is trained, and at which rates."""

import pytest
import torch
from torch import nn

from perfusion_pytorch import (
    EmbeddingWrapper,
    Rank1EditModule,
    get_finetune_optimizer,
    get_finetune_parameters,
    wrap_cross_attentions_,
)


def model_and_encoder():
    model = nn.ModuleDict({"to_k": nn.Linear(8, 6), "to_v": nn.Linear(8, 6), "other": nn.Linear(8, 8)})
    wrap_cross_attentions_(model, C=torch.eye(8), key_names=["to_k"], value_names=["to_v"])
    return model, nn.Sequential(EmbeddingWrapper(nn.Embedding(10, 8), [10], [[2]]))


def test_value_outputs_reach_the_optimizer():
    """`parameters()` overridden kept them from an earlier implementation's optimizer."""
    model, encoder = model_and_encoder()
    expected = [model["to_v"].concept_output, encoder[0].concept_embedding]
    assert [id(p) for p in get_finetune_parameters(model, encoder)] == [id(p) for p in expected]
    assert any(p is model["to_v"].concept_output for p in model.parameters())


def test_groups_have_the_papers_rates():
    optimizer = get_finetune_optimizer(*model_and_encoder())
    assert type(optimizer) is torch.optim.AdamW
    assert [(g["lr"], len(g["params"]), g["weight_decay"], g["betas"]) for g in optimizer.param_groups] == [
        (0.03, 1, 0.0, (0.9, 0.999)),
        (0.006, 1, 0.0, (0.9, 0.999)),
    ]


def test_rates_can_be_chosen():
    optimizer = get_finetune_optimizer(
        *model_and_encoder(), lr_output=0.5, lr_embedding=0.25, betas=(0.5, 0.75), weight_decay=0.125
    )
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.25]
    assert all((g["betas"], g["weight_decay"]) == ((0.5, 0.75), 0.125) for g in optimizer.param_groups)


def test_a_step_moves_the_outputs_by_their_rate():
    model, _ = model_and_encoder()
    optimizer = get_finetune_optimizer(model)
    text_enc, superclass = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    model["to_v"](text_enc, superclass, torch.tensor([1, 2])).square().sum().backward()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"to_v.concept_output"}
    assert (model["to_v"].concept_output - before["to_v.concept_output"]).abs().max().item() == pytest.approx(
        0.03, rel=1e-3
    )


def test_a_shared_parameter_is_listed_once():
    model, encoder = model_and_encoder()
    assert len(get_finetune_parameters(model, model, encoder, nn.ModuleList([encoder]))) == 2


def test_models_with_one_kind_only():
    model, encoder = model_and_encoder()
    assert [g["lr"] for g in get_finetune_optimizer(model).param_groups] == [0.03]
    assert [g["lr"] for g in get_finetune_optimizer(encoder).param_groups] == [0.006]


@pytest.mark.parametrize("function", [get_finetune_parameters, get_finetune_optimizer])
def test_nothing_to_train_is_an_error(function):
    for models in ([], [nn.Linear(3, 3)], [Rank1EditModule(nn.Linear(3, 3), is_key_proj=True)]):
        with pytest.raises(
            ValueError, match="`Rank1EditModule` over a value projection or an `EmbeddingWrapper`"
        ):
            function(*models)


def test_what_a_whole_model_froze_is_trained_after_all():
    layer = Rank1EditModule(nn.Linear(4, 6), C=torch.eye(4))
    layer.requires_grad_(False)
    get_finetune_optimizer(layer)
    assert (
        layer.concept_output.requires_grad and not layer.weight.requires_grad and not layer.bias.requires_grad
    )
