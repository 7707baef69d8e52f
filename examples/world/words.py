"""Words of the world: its tokenizer, and what each word of a caption stands for in the picture."""

import json
import os

import numpy as np
import torch
import world
from plans import MARKS
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPTokenizer

NUM_TOKENS = 24  # of the longest caption, with start and end
MAX_THINGS = 3
NOUNS = frozenset((*world.SUPERCLASSES, *world.BREEDS))
PLACE_WORDS = frozenset(
    ("left", "right", "top", "bottom", "middle", "above", "below", "beside", "next", "and", "with")
)
GROUND_WORDS = frozenset(("background", "wall", "backdrop", "curtain"))
ADJECTIVES = {adjective: pattern for pattern, adjective in world.PATTERNS.items()}
# What words may stand for, and the choices of each.
CHOICES = {
    "superclass": world.SUPERCLASSES,
    "pattern": tuple(world.PATTERNS),
    "mark": tuple(MARKS),
    "background": (*world.BACKGROUNDS, "none"),
    "order": tuple(range(MAX_THINGS)),
}
NUM_NUMBERS = world.NUM_TRAITS + 3  # an identity's numbers; x, y and size


def ground(picture):
    """Return what the words of a picture's caption stand for.

    A noun stands for its thing: superclass, whether it is the first, second or third one, and as far as the words tell it, identity.
    A breed's identity is known; of others the body's shade or the pattern where an adjective names it, and the mean of everything else.
    Nouns behind a place word, and place words, stand for a place: that of the thing named last (in front of a thing: the first one's).
    A colour stands for the background, or for a thing and then not for the background.

    Returns:
        choices: int8 (tokens, kinds of `CHOICES`), −1 where a word stands for no choice.
        numbers: float16 (tokens, `NUM_NUMBERS`), NaN where it stands for no number.
    """
    words, scene = picture.caption.split(), picture.scene
    kinds = {name: i for i, name in enumerate(CHOICES)}
    choices = np.full((NUM_TOKENS, len(CHOICES)), -1, np.int8)
    numbers = np.full((NUM_TOKENS, NUM_NUMBERS), np.nan, np.float16)
    seen = -1  # number of the thing named last
    for i, word in enumerate(words):
        at = i + 1  # behind the start token
        is_adjective = i + 1 < len(words) and words[i + 1] in (*NOUNS, "teddy")
        if word in NOUNS:
            seen += 1
            thing = scene.things[seen]
            choices[at, kinds["superclass"]] = world.SUPERCLASSES.index(thing.superclass)
            choices[at, kinds["order"]] = seen
            numbers[at, : world.NUM_TRAITS] = 0.0
            before = [w for w in words[max(0, i - 3) : i] if w != "teddy"]
            traits = world.trait_numbers(thing.identity)
            if thing.breed is not None:
                numbers[at, : world.NUM_TRAITS] = traits
                choices[at, kinds["mark"]] = CHOICES["mark"].index(thing.identity.mark)
            elif before and before[-1] in world.COLOURS:
                numbers[at, :3] = traits[:3]
            if thing.breed is not None or any(w in ADJECTIVES for w in before[-2:]):
                choices[at, kinds["pattern"]] = CHOICES["pattern"].index(thing.identity.pattern)
            if seen > 0 or len(scene.things) == 1:
                numbers[at, world.NUM_TRAITS :] = _place(thing)
        elif word in PLACE_WORDS and 0 <= seen < len(scene.things):
            numbers[at, world.NUM_TRAITS :] = _place(scene.things[seen])
        elif word in ADJECTIVES:
            choices[at, kinds["pattern"]] = CHOICES["pattern"].index(ADJECTIVES[word])
        elif word in world.BACKGROUNDS:
            is_ground = not is_adjective
            choices[at, kinds["background"]] = CHOICES["background"].index(word if is_ground else "none")
        elif word in GROUND_WORDS:
            choices[at, kinds["background"]] = CHOICES["background"].index(scene.background)
        elif any(word in names for _, _, names in world.SIZES.values()):
            numbers[at, world.NUM_TRAITS :] = _place(scene.things[0])
    return choices, numbers


def _place(thing):
    return [(thing.x - 32) / 14, (thing.y - 32) / 14, (thing.size - 38) / 9]


def make_tokenizer(folder, captions):
    """Train a byte-pair tokenizer in CLIP's format on the captions, until every word of theirs is one token, or read it.

    It is kept, since the trainer breaks ties by chance: another run numbers some words otherwise.
    """
    path = folder / "tokenizer"
    if path.exists():
        return CLIPTokenizer.from_pretrained(path)
    backend = CLIPTokenizer().backend_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=10**6, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    words = sorted(
        {word for caption in captions for word in caption.split()}
        | set(world.BREEDS)
        | set(world.SUPERCLASSES)
    )
    backend.train_from_iterator(words * 2 + [chr(i) for i in range(33, 127)] * 2, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = [t for t in model["vocab"] if not t.startswith("<|")] + ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer = CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=NUM_TOKENS
    )
    split = [word for word in words if len(tokenizer(word).input_ids) != 3]
    if split:
        raise RuntimeError(f"Every word of the captions must be one token, but these are not: {split}.")
    tokenizer.save_pretrained(folder / "tmp-tokenizer")
    os.replace(folder / "tmp-tokenizer", path)
    return tokenizer


def tokenize(tokenizer, captions):
    """Return token ids (b, n), padded with the end token as Stable Diffusion's are."""
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    if ids.shape[1] != NUM_TOKENS:
        raise ValueError(f"A caption must have at most {NUM_TOKENS} tokens, got one of {ids.shape[1]}.")
    return ids


def noun_mask(choices):
    """Return where nouns are, bool (b, n), from the choices (b, n, kinds) of `ground`."""
    return torch.as_tensor(choices)[..., list(CHOICES).index("superclass")] >= 0
