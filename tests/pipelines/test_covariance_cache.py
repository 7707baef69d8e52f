"""The cache of input covariances: computed once, and anew when anything changes that it depends on."""

import sys
import warnings
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from helpers.small_model import make_pipe, train
from helpers.tiny_pipes import text_encoder, tiny_pipe
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from perfusion_pytorch import (
    InputCovariance,
    add_concept_token_,
    calculate_input_covariance,
    remove_concept_token_,
)
from perfusion_pytorch.captions.sources import BuiltInCaptions, CaptionFile
from perfusion_pytorch.pipelines import covariance_cache
from perfusion_pytorch.pipelines.covariance_cache import cached_covariance, covariance_path
from perfusion_pytorch.pipelines.encoding import prompt_encoder

COLOURS = ("red", "blue", "yellow", "white", "green")
CAPTIONS = [
    f"a photo of a {a} {noun} on a {b} background"
    for a in COLOURS
    for b in COLOURS
    for noun in ("car", "bear", "house")
]


@pytest.fixture(scope="module")
def shared_pipe():
    return make_pipe()


@pytest.fixture
def no_computing(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("computed again")

    return lambda: monkeypatch.setattr(covariance_cache, "calculate_input_covariance", refuse)


def test_computed_once_and_the_same_from_the_file(shared_pipe, tmp_path, no_computing, assert_near):
    first = cached_covariance(shared_pipe, CAPTIONS, cache_dir=tmp_path / "new" / "folder", progress=False)
    expected = calculate_input_covariance(CAPTIONS, prompt_encoder(shared_pipe), batch_size=10)
    assert_near(first.matrix, expected.matrix, torch.float32)  # batches differ
    assert (first.num_tokens, first.ridge) == (75 * 20, 1e-6)
    no_computing()
    again = cached_covariance(make_pipe(), CAPTIONS, cache_dir=tmp_path / "new" / "folder")
    assert torch.equal(again.matrix, first.matrix) and torch.equal(again.inverse(), first.inverse())
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path == covariance_path(shared_pipe, CAPTIONS, cache_dir=tmp_path / "new" / "folder")
    loaded = InputCovariance.load(path)
    assert torch.equal(loaded.matrix, first.matrix) and (loaded.num_tokens, loaded.ridge) == (1500, 1e-6)


def test_of_two_processes_the_first_to_be_done_counts(shared_pipe, tmp_path, monkeypatch):
    """In other batches the second computes other bits."""
    compute, first = covariance_cache.calculate_input_covariance, []

    def interrupted(*args, batch_size, **options):
        if not first:
            first.append(None)  # the other process, which begins now, is done first
            first[0] = cached_covariance(
                shared_pipe, CAPTIONS, cache_dir=tmp_path, progress=False, batch_size=7
            )
        return compute(*args, batch_size=batch_size, **options)

    monkeypatch.setattr(covariance_cache, "calculate_input_covariance", interrupted)
    second = cached_covariance(shared_pipe, CAPTIONS, cache_dir=tmp_path, progress=False, batch_size=64)
    assert torch.equal(second.matrix, first[0].matrix) and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    alone = cached_covariance(
        shared_pipe, CAPTIONS, cache_dir=tmp_path / "alone", progress=False, batch_size=64
    )
    assert not torch.equal(alone.matrix, second.matrix)


def test_captions_of_any_kind(shared_pipe, tmp_path, no_computing):
    """A list, a file and an iterator of the same captions are the same captions."""
    (tmp_path / "captions.txt").write_text("\n".join(CAPTIONS))
    options = {"cache_dir": tmp_path / "cache", "progress": False}
    first = cached_covariance(shared_pipe, iter(CAPTIONS), **options)
    no_computing()
    path = tmp_path / "captions.txt"
    for captions in (
        CAPTIONS,
        tuple(CAPTIONS),
        path,
        str(path),
        CaptionFile(path),
        (caption for caption in CAPTIONS),
    ):
        assert torch.equal(cached_covariance(shared_pipe, captions, **options).matrix, first.matrix)


def nudge_weight(pipe):
    pipe.text_encoder.get_input_embeddings().weight.data[3, 3] += 1e-3


def nudge_buffer(pipe):
    pipe.text_encoder.register_buffer("further", torch.ones(1))


def lower_precision(pipe):
    pipe.text_encoder.half()


def reconfigure(pipe):
    pipe.text_encoder.config.layer_norm_eps *= 2


def shorten_prompts(pipe):
    pipe.tokenizer.model_max_length = 16


def pad_otherwise(pipe):
    pipe.tokenizer.pad_token = "a</w>"


def add_word(pipe):
    pipe.tokenizer.add_tokens(["hello"])


@pytest.mark.parametrize(
    "change",
    [nudge_weight, nudge_buffer, lower_precision, reconfigure, shorten_prompts, pad_otherwise, add_word],
    ids=lambda f: f.__name__,
)
def test_another_encoder_or_tokenizer_has_another_file(change):
    pipe = make_pipe()
    before = covariance_path(pipe, CAPTIONS)
    assert covariance_path(make_pipe(), CAPTIONS) == before
    change(pipe)
    assert covariance_path(pipe, CAPTIONS) != before


def test_other_captions_or_another_ridge_have_another_file(shared_pipe):
    paths = [
        covariance_path(shared_pipe, CAPTIONS),
        covariance_path(shared_pipe, CAPTIONS[1:]),
        covariance_path(shared_pipe, ["a car", "a"]),
        covariance_path(shared_pipe, ["a ca", "r", "a"]),
        covariance_path(shared_pipe, CAPTIONS, ridge=1e-5),
    ]
    assert len(set(paths)) == len(paths)


def test_what_does_not_matter_does_not_change_the_file():
    pipe = make_pipe()
    before = covariance_path(pipe, CAPTIONS, ridge=1)
    pipe.tokenizer(["a car"], padding=True, truncation=True, max_length=7)  # leaves its settings behind
    pipe.unet.half()
    pipe.text_encoder.train()
    pipe.text_encoder.requires_grad_(False)
    assert covariance_path(pipe, CAPTIONS, ridge=1.0) == before


def test_concepts_do_not_matter_where_no_caption_names_them(tmp_path):
    pipe = make_pipe()
    before = covariance_path(pipe, CAPTIONS)
    train(pipe, "<bear-1>", "bear")
    assert covariance_path(pipe, CAPTIONS) == before
    with_concept = [*CAPTIONS, "a <bear-1> on red"]
    named = covariance_path(pipe, with_concept)
    pipe.text_encoder.get_input_embeddings().concept_embedding.data += 1
    assert covariance_path(pipe, CAPTIONS) == before != named
    assert covariance_path(pipe, with_concept) != named
    add_concept_token_(pipe.text_encoder, pipe.tokenizer, "<car-1>", "car")
    remove_concept_token_(pipe.text_encoder, pipe.tokenizer, "<bear-1>")  # whose id stays taken
    assert covariance_path(pipe, CAPTIONS) == before


def test_a_lora_on_the_text_encoder_matters():
    from peft import LoraConfig, inject_adapter_in_model

    pipe = make_pipe()
    inject_adapter_in_model(LoraConfig(r=1, target_modules=["q_proj"]), pipe.text_encoder)
    before = covariance_path(pipe, CAPTIONS)
    assert before != covariance_path(make_pipe(), CAPTIONS)
    layer = next(m for m in pipe.text_encoder.modules() if covariance_cache.is_adapter(m))
    layer.scaling["default"] = 0.5
    assert covariance_path(pipe, CAPTIONS) != before


def flip_last_byte(data):
    return data[:-1] + bytes([data[-1] ^ 1])


def change_number_of_tokens(data):
    return data.replace(b'num_tokens\\": 1500', b'num_tokens\\": 1501')


DAMAGES = {
    "a flipped bit": flip_last_byte,
    "other metadata": change_number_of_tokens,
    "cut off": lambda data: data[:-100],
    "cut off in the header": lambda data: data[:50],
    "empty": lambda data: b"",
    "something else": lambda data: b"\x02\0\0\0\0\0\0\0{}",
    "text": lambda data: b"hello" * 10,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_computed_again(shared_pipe, tmp_path, damage):
    options = {"cache_dir": tmp_path, "progress": False}
    first = cached_covariance(shared_pipe, CAPTIONS, **options)
    path = covariance_path(shared_pipe, CAPTIONS, cache_dir=tmp_path)
    whole = path.read_bytes()
    damaged = DAMAGES[damage](whole)
    assert damaged != whole
    path.write_bytes(damaged)
    with pytest.warns(UserWarning, match="is damaged .* so it is computed again"):
        again = cached_covariance(shared_pipe, CAPTIONS, **options)
    assert torch.equal(again.matrix, first.matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cached_covariance(shared_pipe, CAPTIONS, **options).matrix, first.matrix)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_file_under_another_name_is_not_taken(shared_pipe, tmp_path):
    """As after a copy, or where two keys were to begin alike."""
    cached_covariance(shared_pipe, CAPTIONS[1:], cache_dir=tmp_path, progress=False)
    (path,) = tmp_path.iterdir()
    path.rename(covariance_path(shared_pipe, CAPTIONS, cache_dir=tmp_path))
    with pytest.warns(UserWarning, match="is damaged"):
        assert cached_covariance(shared_pipe, CAPTIONS, cache_dir=tmp_path, progress=False).num_tokens == 1500


def test_a_folder_that_cannot_be_written_is_a_warning(shared_pipe, tmp_path):
    (tmp_path / "file").touch()
    expected = cached_covariance(shared_pipe, CAPTIONS, cache_dir=tmp_path / "cache", progress=False)
    with pytest.warns(UserWarning, match=r"cannot be cached .* or \$PERFUSION_CACHE"):
        found = cached_covariance(shared_pipe, CAPTIONS, cache_dir=tmp_path / "file", progress=False)
    assert torch.equal(found.matrix, expected.matrix)


def test_the_folder(shared_pipe, tmp_path, monkeypatch):
    monkeypatch.delenv("PERFUSION_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert covariance_path(shared_pipe, CAPTIONS).parent == tmp_path / ".cache" / "perfusion_pytorch"
    monkeypatch.setenv("PERFUSION_CACHE", "~/elsewhere")
    assert covariance_path(shared_pipe, CAPTIONS).parent == tmp_path / "elsewhere"
    assert covariance_path(shared_pipe, CAPTIONS, cache_dir=tmp_path).parent == tmp_path


def test_the_built_in_captions_are_refused_where_their_words_are_unknown(shared_pipe, tmp_path):
    with pytest.raises(
        ValueError, match="The built-in captions must be in words that the text encoder's tokenizer knows"
    ):
        cached_covariance(shared_pipe, BuiltInCaptions(2000), cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_built_in_captions_are_taken_where_their_words_are_known(tmp_path):
    captions = BuiltInCaptions(300)
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.train_from_iterator(
        captions, trainers.WordLevelTrainer(special_tokens=["<start>", "<end>", "<unk>"])
    )
    named = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<end>", "unk_token": "<unk>"}
    pipe = tiny_pipe()
    pipe.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=20, **named)
    pipe.text_encoder = text_encoder(CLIPTextModel, 12, pipe.tokenizer)
    covariance = cached_covariance(pipe, captions, cache_dir=tmp_path, progress=False)
    assert (covariance.num_tokens, covariance.dim) == (300 * 20, 12) and len(list(tmp_path.iterdir())) == 1


def test_no_captions(shared_pipe, tmp_path):
    with pytest.raises(ValueError, match="at least one caption"):
        cached_covariance(shared_pipe, [], cache_dir=tmp_path, progress=False)


def test_weights_that_are_not_there(tmp_path):
    pipe = make_pipe()
    pipe.text_encoder = deepcopy(pipe.text_encoder).to("meta")
    with pytest.raises(ValueError, match=r"must hold its weights, but '.*' is on the meta device"):
        covariance_path(pipe, CAPTIONS)


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_on_stderr(shared_pipe, tmp_path, capfd, progress):
    cached_covariance(shared_pipe, CAPTIONS, cache_dir=tmp_path, batch_size=25, progress=progress)
    out, err = capfd.readouterr()
    assert out == "" and ("covariance" in err and "/3 " in err) == progress


def test_without_tqdm_there_is_no_bar(shared_pipe, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert cached_covariance(shared_pipe, CAPTIONS, cache_dir=tmp_path).num_tokens == 1500
    assert capfd.readouterr().err == ""


def test_a_slow_tokenizer_is_known_by_its_words_and_merges():
    def state(words, merges):
        about = {
            "model_max_length": 20,
            "pad_token": "!",
            "padding_side": "right",
            "bpe_ranks": {merge: i for i, merge in enumerate(merges)},
        }
        return covariance_cache.tokenizer_state(SimpleNamespace(get_vocab=lambda: words, **about), {}, set())

    one = state({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    assert one == state({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    assert one != state({"a": 1, "b": 0, "ab": 2}, [("a", "b")]) and one != state(
        {"a": 0, "b": 1, "ab": 2}, [("b", "a")]
    )


def test_half_precision(tmp_path, assert_near):
    pipe = make_pipe()
    expected = cached_covariance(pipe, CAPTIONS, cache_dir=tmp_path, progress=False).matrix
    pipe.text_encoder.to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = cached_covariance(pipe, CAPTIONS, cache_dir=tmp_path, progress=False)
    assert_near(found.matrix, expected, torch.bfloat16)
    assert len(list(tmp_path.iterdir())) == 2
    assert load_file(covariance_path(pipe, CAPTIONS, cache_dir=tmp_path))["covariance"].dtype == torch.float64
