"""What verbs and training share of a pipeline's parts."""

import pytest
from helpers.small_model import assert_unchanged, make_pipe, state_of
from helpers.tiny_pipes import tiny_pipe
from torch import nn

from perfusion_pytorch import EmbeddingWrapper, add_concept_token_, wrap_cross_attentions_
from perfusion_pytorch.pipelines import parts
from perfusion_pytorch.pipelines.parts import (
    add_token_,
    pool_at_largest_id_,
    projections_of,
    remove_token_,
    requires_grad_kept,
)
from perfusion_pytorch.pipelines.replacements import Replacements


def test_a_token_is_added_to_all_text_encoders_and_removed():
    pipe = tiny_pipe("SDXL")
    state = state_of(pipe)
    with requires_grad_kept([pipe.text_encoder, pipe.text_encoder_2]):
        added = add_token_(pipe, "<car-1>", "car")
        assert list(added.embeddings) == ["text_encoder", "text_encoder_2"]
        for name, embedding in added.embeddings.items():
            encoder = getattr(pipe, name)
            assert encoder.get_input_embeddings() is embedding and isinstance(embedding, EmbeddingWrapper)
            trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
            assert len(trained) == 1 and trained[0] is embedding.concept_embedding
        assert {module.eos_token_id for module in added.pooling} == {pipe.tokenizer.eos_token_id} != {2}
        remove_token_(pipe, "<car-1>")
        pool_at_largest_id_(added.pooling)
    assert_unchanged(pipe, state)


def test_a_token_that_only_the_first_tokenizer_takes_is_added_to_none(monkeypatch):
    pipe = tiny_pipe("SDXL")
    state = state_of(pipe)

    def add(encoder, tokenizer, token, superclass):
        if encoder is pipe.text_encoder_2:
            raise KeyError(token)
        return add_concept_token_(encoder, tokenizer, token, superclass)

    monkeypatch.setattr(parts, "add_concept_token_", add)
    modules = [pipe.text_encoder, pipe.text_encoder_2]
    with pytest.raises(KeyError), requires_grad_kept(modules):
        add_token_(pipe, "<car-1>", "car")
    assert_unchanged(pipe, state)


def test_requires_grad_is_kept_through_an_exception():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    with pytest.raises(KeyError), requires_grad_kept([layer]):
        layer.weight.requires_grad_(False)
        layer.bias.requires_grad_(True)
        raise KeyError
    assert layer.weight.requires_grad and not layer.bias.requires_grad


def test_projections_are_found_plain_and_wrapped():
    unet = make_pipe().unet
    plain = projections_of(unet)
    assert {name.rpartition(".")[2]: is_key for name, (_, is_key) in plain.items()} == {
        "to_k": True,
        "to_v": False,
    }
    assert all(unet.get_submodule(name) is layer for name, (layer, _) in plain.items())
    wrapped = wrap_cross_attentions_(unet, C=None)
    assert {name: layer for name, (layer, _) in projections_of(unet).items()} == wrapped


class Greeter:
    def greet(self):
        return "hello"


def test_a_method_of_the_object_itself_is_put_back():
    """As a user's own replacement of a pipeline's method."""
    greeter = Greeter()
    greeter.greet = own = lambda: "own"
    for text in ("first", "second"):
        Replacements.on(greeter).put("greet", lambda text=text: text)
        assert greeter.greet() == text
    Replacements.on(greeter).take_back()
    assert vars(greeter) == {"greet": own}
    Replacements.on(greeter).take_back()  # nothing to do
    assert vars(greeter) == {"greet": own}
