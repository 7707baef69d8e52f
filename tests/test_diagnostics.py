"""The similarity of each token to the concepts."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from perfusion_pytorch import InputCovariance, token_similarities, wrap_cross_attentions_


class Words:
    """A tokenizer of three whole words, padded to the length asked for."""

    known = ("<pad>", "a</w>", "cat</w>", "dog</w>")

    def __call__(self, prompts, *, padding, truncation, max_length):
        ids = [[self.known.index(f"{word}</w>") for word in prompt.split()] for prompt in prompts]
        return SimpleNamespace(input_ids=[row + [0] * (max_length - len(row)) for row in ids])

    def convert_ids_to_tokens(self, ids):
        return [self.known[i] for i in ids]


def encode_with(table):
    def encode(prompts):
        encodings, mask = torch.zeros(len(prompts), 6, 4), torch.zeros(len(prompts), 6, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            for column, word in enumerate(prompt.split()):
                encodings[row, column], mask[row, column] = table[word], True
        return encodings, mask

    return encode


def test_each_token_has_its_similarity():
    model = nn.ModuleDict({"to_v": nn.Linear(4, 3)})
    layer = wrap_cross_attentions_(
        model, C=InputCovariance(torch.eye(4)), value_names=["to_v"], num_concepts=3
    )["to_v"]
    table = {
        "a": torch.tensor([0.0, 0, 0, 5]),
        "cat": torch.tensor([2.0, 0, 0, 0]),
        "dog": torch.tensor([1.0, 1, 0, 0]),
    }
    for concept, word in ((0, "cat"), (2, "dog")):
        layer(table[word].expand(1, 1, 4), table[word].expand(1, 1, 4), torch.tensor([0]), concept_id=concept)
    rows = token_similarities(model, Words(), encode_with(table), ["a cat", "dog"])
    assert rows == [[("a", (0.0, 0.0)), ("cat", (1.0, 1.0))], [("dog", (0.5, 1.0))]]


def test_slots_never_seen_do_not_count():
    model = nn.ModuleDict({"to_v": nn.Linear(4, 3)})
    options = {"value_names": ["to_v"], "num_concepts": 2, "num_finetune_prompts": 3}
    layer = wrap_cross_attentions_(model, C=InputCovariance(torch.eye(4)), **options)["to_v"]
    table = {
        "a": torch.tensor([0.0, 0, 0, 5]),
        "cat": torch.tensor([2.0, 0, 0, 0]),
        "dog": torch.tensor([1.0, 1, 0, 0]),
    }
    encodings = torch.stack([table["cat"], table["dog"]]).unsqueeze(1)
    layer(encodings, encodings, torch.tensor([0, 0]), prompt_ids=torch.tensor([2, 0]), concept_id=1)
    (row,) = token_similarities(model, Words(), encode_with(table), ["cat dog a"])
    mean = (table["cat"] + table["dog"]) / 2
    assert row == [(word, ((table[word] @ mean / (mean @ mean)).item(),)) for word in ("cat", "dog", "a")]


def test_a_model_that_has_seen_no_concept_is_an_error():
    model = nn.ModuleDict({"to_v": nn.Linear(4, 3)})
    wrap_cross_attentions_(model, C=None, value_names=["to_v"])
    with pytest.raises(ValueError, match="No wrapped layer of ModuleDict has seen a concept"):
        token_similarities(model, Words(), encode_with({}), ["a"])
