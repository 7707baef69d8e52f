"""Captions for the input covariance: the built-in ones, and those of a file."""

from itertools import islice

import pytest
from helpers.small_model import MODEL
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from perfusion_pytorch.captions import words as caption_words
from perfusion_pytorch.captions.grammar import plural, word_list
from perfusion_pytorch.captions.sources import (
    BuiltInCaptions,
    CaptionFile,
    check_words_are_known,
    share_of_unknown_words,
)
from perfusion_pytorch.files import sha256_of

# SHA-256 of the first 2000 captions, one a line.
PINNED = "ba0092f70bfdc8ee2c10017b7bc8b0162922f08d0187725a2ee4f13880cc6330"
LISTS = [name for name in vars(caption_words) if name.isupper()]


@pytest.fixture(scope="module")
def small_tokenizer():
    return AutoTokenizer.from_pretrained(MODEL / "tokenizer")


def tokenizer_of(words):
    """A byte-pair tokenizer that knows some words whole, and the letters."""
    letters = [chr(i) for i in range(97, 123)]
    merges, pieces = [], [*letters, *(letter + "</w>" for letter in letters), "<|endoftext|>"]
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            pieces.append(parts[0])
    backend = Tokenizer(
        BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges, end_of_word_suffix="</w>")
    )
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_captions_are_the_same_each_time_and_each_its_own():
    captions = list(BuiltInCaptions(500))
    assert captions == list(BuiltInCaptions(500)) == list(islice(BuiltInCaptions(), 500))
    assert captions != list(BuiltInCaptions(500, seed=1))
    assert len(set(captions)) > 480
    assert captions[0] == next(iter(BuiltInCaptions(1)))


def test_captions_stay_the_same_to_the_letter():
    """Covariances in caches and in papers were made of them."""
    assert sha256_of(f"{caption}\n" for caption in BuiltInCaptions(2000)) == PINNED


def test_captions_are_sentences_and_nothing_is_left_unfilled():
    captions = list(BuiltInCaptions(5000))
    for caption in captions:
        assert caption == " ".join(caption.split()) and 3 <= len(caption) < 300, caption
        assert not set(caption) & set("{}_|"), caption
        assert caption.isascii(), caption
    words = {word for caption in captions for word in caption.split()}
    assert len(words) > 3000  # of everyday language, many
    assert 6 < sum(len(caption.split()) for caption in captions) / 5000 < 12


def test_articles_fit():
    captions = [f" {caption} " for caption in BuiltInCaptions(5000)]
    for wrong in (
        " a apple ",
        " a old ",
        " an dog ",
        " an unicorn ",
        " a a ",
        " a an ",
        " a the ",
        " the the ",
        " a my ",
    ):
        assert not [caption for caption in captions if wrong in caption], wrong


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_words_are_clean(name):
    words = word_list(name)
    assert len(words) > 10 and all(words)
    assert all(word == " ".join(word.split()) and "_" not in word for word in words)


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("hero", "heroes"), ("teddy bear", "teddy bears"), ("sheep", "sheep"), ("glass", "glasses")],
)
def test_plurals(noun, expected):
    assert plural(noun) == expected


def test_a_file_is_read_line_by_line_each_time_anew(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a car\r\n\n  a bär \n", encoding="utf-8")
    captions = CaptionFile(path)
    assert list(captions) == list(captions) == ["a car", "a bär"] and len(captions) == 2
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="must hold captions, one a line, but it is empty"):
        list(captions)
    path.write_bytes(b"\xff\xfe\x00c")
    with pytest.raises(ValueError, match="must be a text file in UTF-8"):
        list(captions)
    with pytest.raises(FileNotFoundError, match=r"There is no caption file .*none.txt\. Give a text file"):
        list(CaptionFile(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match="must be a text file of captions, one a line, but it is a folder"):
        list(CaptionFile(tmp_path))


def test_words_are_known_whole_or_in_large_pieces():
    tokenizer = tokenizer_of(["photo", "graph", "bear"])
    assert share_of_unknown_words(tokenizer, ["a photo of a bear, 12"]) == 0
    assert share_of_unknown_words(tokenizer, ["a vase and a bear"]) == 0.5  # short words do not count
    assert share_of_unknown_words(tokenizer, ["Bear vase vase vase"]) == 0.75  # as often as it is there
    assert share_of_unknown_words(tokenizer, ["a of"]) == 0


def test_a_token_for_the_unknown_is_unknown():
    tokenizer = AutoTokenizer.from_pretrained(MODEL / "tokenizer")
    tokenizer.unk_token = "bear</w>"
    assert share_of_unknown_words(tokenizer, ["bear"]) == 1


def test_the_small_model_knows_its_own_words_and_not_the_built_in_ones(small_tokenizer):
    check_words_are_known(small_tokenizer, ["a photo of a bear on a background"])
    with pytest.raises(
        ValueError, match=r"The built-in captions must be in words .*by `cached_covariance\(pipe, captions\)`"
    ):
        check_words_are_known(small_tokenizer, BuiltInCaptions())
    with pytest.raises(ValueError, match=r"^The captions must be in words"):
        check_words_are_known(small_tokenizer, ["quixotic xylophones", "bear"])
