"""Concept tokens on a tiny random CLIP text encoder and a tiny CLIP tokenizer."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from perfusion_pytorch import (
    EmbeddingWrapper,
    Rank1EditModule,
    add_concept_token_,
    get_finetune_optimizer,
    tokenize_with_concept,
)

TOKEN = "<teddy-1>"
LENGTH = 12


@pytest.fixture(scope="module")
def vocabulary_folder(tmp_path_factory):
    """A CLIP vocabulary of letters and five words."""
    letters = "abcdefghijklmnopqrstuvwxyz<>-0123456789!,"
    vocabulary, merges = list(letters) + [f"{letter}</w>" for letter in letters], []
    for word in ("teddy", "bear", "photo", "red", "of"):
        so_far = word[0]
        for part in [*word[1:-1], f"{word[-1]}</w>"]:
            if f"{so_far} {part}" not in merges:
                merges.append(f"{so_far} {part}")
                vocabulary.append(so_far + part)
            so_far += part
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return folder


@pytest.fixture
def tokenizer(vocabulary_folder):
    return CLIPTokenizer.from_pretrained(vocabulary_folder, model_max_length=LENGTH)


@pytest.fixture
def text_encoder(tokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def encode(tokenizer, text_encoder, prompts):
    ids = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids
    return text_encoder(ids)


def test_prompts_without_the_token_encode_bit_for_bit_as_before(tokenizer, text_encoder):
    prompts = ["a photo of a teddy bear", "a red bear !", ""]
    before = encode(tokenizer, text_encoder, prompts)
    keys, vocabulary = list(text_encoder.state_dict()), text_encoder.config.vocab_size
    embedding_key = next(key for key in keys if key.endswith("token_embedding.weight"))
    add_concept_token_(text_encoder, tokenizer, TOKEN, "teddy bear")
    after = encode(tokenizer, text_encoder, prompts)
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)
    assert torch.equal(after.pooler_output, before.pooler_output)
    concept_key = embedding_key.removesuffix("weight") + "concept_embedding"
    assert sorted(text_encoder.state_dict()) == sorted([*keys, concept_key])
    assert text_encoder.config.vocab_size == vocabulary == text_encoder.get_input_embeddings().num_embeddings


def test_no_random_numbers_are_drawn(tokenizer, text_encoder):
    state = torch.get_rng_state()
    embedding = add_concept_token_(text_encoder, tokenizer, TOKEN, "bear")
    embedding(torch.tensor([[0, embedding.concept_ids[0]]]))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_superclass_of_several_tokens(tokenizer, text_encoder):
    """Earlier implementations refused "teddy bear": its row is the mean, its position the last token."""
    teddy, bear = (tokenizer(word, add_special_tokens=False).input_ids for word in ("teddy", "bear"))
    rows = text_encoder.get_input_embeddings().weight[teddy + bear].detach().clone()
    embedding = add_concept_token_(text_encoder, tokenizer, TOKEN, "teddy bear")
    assert embedding.superclass_ids == ((*teddy, *bear),)
    assert torch.allclose(embedding.concept_embedding, rows.mean(dim=0, keepdim=True))
    prompts = embedding.with_superclass(tokenize_with_concept(tokenizer, [f"a photo of {TOKEN} red"], TOKEN))
    assert torch.equal(
        prompts.ids,
        tokenizer(["a photo of teddy bear red"], padding="max_length", return_tensors="pt").input_ids,
    )
    assert (prompts.concept_indices.tolist(), prompts.superclass_indices.tolist()) == ([4], [5])


def test_only_the_concept_row_gets_a_gradient(tokenizer, text_encoder):
    """The text transformer passes gradients on: an earlier implementation ran it under `no_grad`."""
    embedding = add_concept_token_(text_encoder, tokenizer, TOKEN, "bear")
    text_encoder.train()
    text_encoder(
        tokenize_with_concept(tokenizer, [f"a {TOKEN}"], TOKEN)
    ).last_hidden_state.square().sum().backward()
    assert [name for name, p in text_encoder.named_parameters() if p.requires_grad] == [
        name for name, p in text_encoder.named_parameters() if p.grad is not None
    ]
    assert embedding.concept_embedding.grad.abs().sum() > 0
    assert sum(p.requires_grad for p in text_encoder.parameters()) == 1


def test_of_two_concepts_only_the_one_in_the_prompt_gets_a_gradient():
    embedding = EmbeddingWrapper(nn.Embedding(10, 4), [10, 12], [[2], [3, 4]])
    embedding(torch.tensor([[1, 12, 3]])).square().sum().backward()
    assert not embedding.concept_embedding.grad[0].any() and embedding.concept_embedding.grad[1].all()


def test_the_embedding_learns_through_encoder_and_layer(tokenizer, text_encoder):
    embedding = add_concept_token_(text_encoder, tokenizer, TOKEN, "teddy bear")
    layer = Rank1EditModule(nn.Linear(16, 8), C=torch.eye(16))
    optimizer = get_finetune_optimizer(layer, text_encoder)
    ids = tokenize_with_concept(tokenizer, [f"a photo of {TOKEN}", "a red bear"], TOKEN)
    prompts = embedding.with_superclass(ids)
    with torch.no_grad():
        superclass = text_encoder(prompts.ids).last_hidden_state
    before = {name: p.clone() for name, p in (*text_encoder.named_parameters(), *layer.named_parameters())}
    values = layer(
        text_encoder(ids).last_hidden_state,
        superclass,
        prompts.concept_indices,
        superclass_indices=prompts.superclass_indices,
    )
    initial = layer.concept_output.clone()  # W s, set by the call
    values.square().sum().backward()
    optimizer.step()
    moved = {
        name
        for name, p in (*text_encoder.named_parameters(), *layer.named_parameters())
        if not torch.equal(p, before[name])
    }
    assert {name.rpartition(".")[2] for name in moved} == {"concept_embedding", "concept_output"}
    assert (layer.concept_output - initial).abs().max().item() == pytest.approx(0.03, rel=1e-3)
    start = next(p for name, p in before.items() if name.endswith("concept_embedding"))
    assert (embedding.concept_embedding - start).abs().max().item() == pytest.approx(0.006, rel=1e-3)


def test_the_wrapper_is_an_embedding_over_the_same_weight():
    plain = nn.Embedding(10, 4, padding_idx=1)
    weight = plain.weight
    embedding = EmbeddingWrapper(plain, [10], [[2]])
    assert isinstance(embedding, nn.Embedding) and embedding.weight is weight and not weight.requires_grad
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (10, 4, 1)
    assert [name for name, _ in embedding.named_parameters()] == ["weight", "concept_embedding"]
    ids = torch.tensor([[1, 2, 9]])
    assert torch.equal(embedding(ids), nn.functional.embedding(ids, weight))
    assert "concept_ids=[10]" in repr(embedding)


def test_concept_rows_come_in_where_their_ids_stand():
    embedding = EmbeddingWrapper(nn.Embedding(10, 4), [11, 10], [[2], [3]])
    rows = embedding(torch.tensor([[10, 4, 11]]))
    assert torch.equal(
        rows[0],
        torch.stack([embedding.concept_embedding[1], embedding.weight[4], embedding.concept_embedding[0]]),
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_the_trained_rows_stay_float32_in_8_bits(dtype):
    embedding = EmbeddingWrapper(nn.Embedding(10, 4), [10], [[2]])
    row = embedding.concept_embedding.detach().clone()
    embedding.to(dtype)
    assert embedding.weight.dtype == dtype and torch.equal(embedding.concept_embedding, row)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_encoder_keeps_its_dtype(dtype):
    embedding = EmbeddingWrapper(nn.Embedding(10, 4).to(dtype), [10], [[2]])
    assert embedding.concept_embedding.dtype == torch.float32
    assert embedding(torch.tensor([[10, 1]])).dtype == dtype
    row = embedding.concept_embedding.detach().clone()
    embedding.to(dtype)
    assert torch.equal(embedding.concept_embedding, row)


def test_copies_and_state_dicts():
    embedding = EmbeddingWrapper(nn.Embedding(10, 4), [10], [[2, 3]])
    ids = torch.tensor([[10, 1]])
    copied = copy.deepcopy(embedding)
    other = EmbeddingWrapper(nn.Embedding(10, 4), [10], [[2, 3]])
    assert not torch.equal(other(ids), embedding(ids))
    other.load_state_dict(embedding.state_dict())
    for same in (copied, other):
        assert torch.equal(same(ids), embedding(ids))
    assert copied.weight is not embedding.weight


def test_the_wrapper_compiles():
    embedding = EmbeddingWrapper(nn.Embedding(10, 4), [10], [[2]]).eval()
    ids = torch.tensor([[10, 1]])
    torch.compiler.reset()
    assert torch.equal(torch.compile(embedding, backend="eager", fullgraph=True)(ids), embedding(ids))


# -------------------------------------------------------------------------------- superclass prompts


@pytest.mark.parametrize(
    "superclass, row, expected, positions",
    [
        ([2], [8, 10, 5, 9, 9], [8, 2, 5, 9, 9], (1, 1)),
        ([2, 3], [8, 10, 5, 9, 9], [8, 2, 3, 5, 9], (1, 2)),
        ([2, 3], [8, 10, 5, 6, 9], [8, 2, 3, 6, 9], (1, 2)),  # full: a word is dropped, the end stays
        (
            [2, 3, 4],
            [8, 10, 5, 6, 7, 9, 0],
            [8, 2, 3, 4, 5, 9, 0],
            (1, 3),
        ),  # the end is not the last token, and stays
        ([2, 3, 4], [8, 10, 5, 9, 0, 0, 0], [8, 2, 3, 4, 5, 9, 0], (1, 3)),
        ([2, 3], [8, 5, 5, 9, 9], [8, 5, 5, 9, 9], (-1, -1)),
        ([2, 3], [8, 10, 9, 0, 0], [8, 2, 3, 9, 0], (1, 2)),  # pads of another id than the end's
    ],
)
def test_superclass_prompts(superclass, row, expected, positions):
    embedding = EmbeddingWrapper(nn.Embedding(10, 4), [10], [superclass])
    prompts = embedding.with_superclass(torch.tensor([row, row]))
    assert prompts.ids.tolist() == [expected, expected]
    assert (prompts.concept_indices.tolist(), prompts.superclass_indices.tolist()) == (
        [positions[0]] * 2,
        [positions[1]] * 2,
    )


def test_the_second_concept_has_a_superclass_of_its_own():
    embedding = EmbeddingWrapper(nn.Embedding(10, 4), [10, 11], [[2], [3, 4]])
    ids = torch.tensor([[8, 10, 11, 5, 9, 9]])
    assert embedding.with_superclass(ids, 1).ids.tolist() == [[8, 10, 3, 4, 5, 9]]
    assert embedding.with_superclass(ids, 0).ids.tolist() == [[8, 2, 11, 5, 9, 9]]


@pytest.mark.parametrize(
    "row, message",
    [
        ([8, 10, 10, 5, 9], "at most once, got it 2 times"),
        ([8, 5, 5, 5, 10], "must fit"),
        ([8, 5, 5, 10, 9], "must fit before the end"),
    ],
)
def test_superclass_prompts_that_cannot_be(row, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingWrapper(nn.Embedding(10, 4), [10], [[2, 3]]).with_superclass(torch.tensor([row]))


# -------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "concept_ids, superclass_ids, message",
    [
        ([], [], "one superclass for each"),
        ([10], [[1], [2]], "one superclass for each"),
        ([10, 10], [[1], [2]], "different concepts"),
        ([-1], [[1]], "at least 0"),
        ([9], [[9]], "tokens of the vocabulary, from 0 to 9"),
        ([10], [[10]], "tokens of the vocabulary, from 0 to 9"),
        ([10], [[]], "at least one each"),
    ],
)
def test_ids_that_do_not_fit(concept_ids, superclass_ids, message):
    plain = nn.Embedding(10, 4)
    with pytest.raises(ValueError, match=message):
        EmbeddingWrapper(plain, concept_ids, superclass_ids)
    assert plain.weight.requires_grad


def test_a_further_concepts_superclass_is_no_other_concept():
    """Also where a concept's id is within the embedding's rows, of which T5's has more than its tokenizer."""
    embedding = EmbeddingWrapper(nn.Embedding(12, 4), [10], [[2]])
    for wrong in ([10], [11], [12], []):
        with pytest.raises(ValueError, match="tokens of the vocabulary, from 0 to 11"):
            embedding.with_concept(11, wrong)
    more = embedding.with_concept(11, [2, 3])
    assert more.concept_ids == (10, 11) and torch.equal(more.weight, embedding.weight)
    assert torch.equal(more.concept_embedding[1], more.weight[[2, 3]].mean(dim=0))
    assert torch.equal(more.without_concept(10).concept_embedding, more.concept_embedding[1:])


def test_only_plain_embeddings_are_wrapped():
    embedding = EmbeddingWrapper(nn.Embedding(10, 4), [10], [[2]])
    for wrong in (embedding, nn.Linear(10, 4)):
        with pytest.raises(ValueError, match=f"plain nn.Embedding, got {type(wrong).__name__}"):
            EmbeddingWrapper(wrong, [11], [[2]])


def test_an_unknown_id_is_an_error():
    embedding = EmbeddingWrapper(nn.Embedding(10, 4), [11], [[2]])
    with pytest.raises(ValueError, match=r"below 10 or among the concepts' \[11\], got \[10, 12\]"):
        embedding(torch.tensor([[10, 11, 12, 1]]))


@pytest.mark.parametrize(
    "token, message",
    [
        ("<Teddy>", "lower-case"),
        ("my teddy", "without white space"),
        ("", "one lower-case word"),
        (
            "bear",
            "must be new to the tokenizer, but it knows 'bear' already. Choose another, such as '<bear-2>'",
        ),
        (
            "bearred",
            "must not be of letters and digits alone, or it would be found within words. Take '<bearred>'",
        ),
    ],
)
def test_tokens_that_cannot_be(tokenizer, text_encoder, token, message):
    with pytest.raises(ValueError, match=message):
        add_concept_token_(text_encoder, tokenizer, token, "bear")
    assert type(text_encoder.get_input_embeddings()) is nn.Embedding


def test_a_token_is_added_once(tokenizer, text_encoder):
    add_concept_token_(text_encoder, tokenizer, TOKEN, "bear")
    before = len(tokenizer)
    with pytest.raises(ValueError, match=r"must be new to the tokenizer.*<teddy-1-2>"):
        add_concept_token_(text_encoder, tokenizer, TOKEN, "bear")
    assert len(tokenizer) == before


def test_a_superclass_must_be_known(tokenizer, text_encoder):
    for superclass in ("", "ü€"):
        before = len(tokenizer)
        with pytest.raises(ValueError, match="words that the tokenizer knows"):
            add_concept_token_(text_encoder, tokenizer, TOKEN, superclass)
        assert len(tokenizer) == before and all(p.requires_grad for p in text_encoder.parameters())


def test_tokens_that_do_not_arrive_are_errors(tokenizer, text_encoder):
    with pytest.raises(ValueError, match=r"does not know '<teddy-1>'; its added tokens are \["):
        tokenize_with_concept(tokenizer, [f"a {TOKEN}"], TOKEN)
    embedding = add_concept_token_(text_encoder, tokenizer, TOKEN, "bear")
    with pytest.raises(ValueError, match="in lower case, got the prompt 'a <Teddy-1>'"):
        tokenize_with_concept(tokenizer, [f"a {TOKEN}", "a <Teddy-1>"], TOKEN)
    with pytest.raises(ValueError, match=r"within the prompt's first 10 tokens.*was lost from the prompt"):
        tokenize_with_concept(tokenizer, [" of" * 11 + TOKEN], TOKEN)
    ids = tokenize_with_concept(tokenizer, [f"a {TOKEN}, red", "a bear"], TOKEN)
    assert ids.shape == (2, LENGTH) and (ids == embedding.concept_ids[0]).sum(dim=1).tolist() == [1, 0]
