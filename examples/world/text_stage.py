"""The text encoder: words grounded in their pictures, so that the input covariance separates them; then it is frozen."""

import torch
import torch.nn.functional as F
from stages import device, train_stage
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel
from words import CHOICES, NUM_NUMBERS, NUM_TOKENS, noun_mask

RIDGE = 1e-6  # of the covariance, in parts of its mean eigenvalue; what the library uses on this model


def make_text_encoder(tokenizer, *, width=128, layers=2):
    """Return an untrained text encoder in CLIP's format."""
    torch.manual_seed(0)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=NUM_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # CLIP's own start (0.02) lets the context drown the words from the first step on.
    encoder.get_input_embeddings().weight.data.normal_(std=0.15)
    return encoder


def second_moment(encodings):
    """Return C = E[e eᵀ] over all positions, (d, d), of encodings (b, n, d)."""
    rows = encodings.flatten(0, 1)
    return rows.T @ rows / len(rows)


def regularised(moment, ridge=RIDGE):
    """Return C + ridge · tr(C)/d · I."""
    width = len(moment)
    return moment + ridge * moment.trace() / width * torch.eye(
        width, dtype=moment.dtype, device=moment.device
    )


class NewWords:
    """Prompts in which a noun is replaced by a word that has yet to be learned: its embedding is a noun's, moved at random.

    Every word is used in several prompts; their mean encoding is its target input i*, as the library computes it.

    Args:
        ids: token ids of the prompts (w · p, n), the prompts of one word behind each other.
        at: positions of the replaced nouns (w · p, 1).
        nouns: ids of the nouns that the words start from (w,).
        moves: standard deviations of the embedding table by which each is moved (w,).
        generator: which way.
    """

    def __init__(self, ids, at, nouns, moves, generator):
        self.shape = (len(nouns), len(ids) // len(nouns))
        self.ids = ids.scatter(1, at, nouns.repeat_interleave(self.shape[1]).unsqueeze(1))
        self.at, self.moves, self.generator = at, moves, generator

    @classmethod
    def anywhere(cls, ids, is_noun, generator, *, num_prompts=4, largest_move=2.0):
        """Put any nouns in the places of others: a hard exercise, since a prompt may then hold two of one superclass."""
        num_words = len(ids) // num_prompts
        options = {"generator": generator, "device": ids.device}
        at = torch.multinomial(is_noun.float(), 1, generator=generator)
        nouns = ids[is_noun]
        chosen = nouns[torch.randint(len(nouns), (num_words,), **options)]
        return cls(ids, at, chosen, largest_move * torch.rand(num_words, **options), generator)

    def encode(self, encoder):
        """Return the encodings (w · p, n, d) of the prompts."""
        table = encoder.get_input_embeddings()
        noise = torch.randn(
            len(self.moves), table.embedding_dim, generator=self.generator, device=self.ids.device
        )
        move = self.moves.unsqueeze(1) * noise * table.weight.detach().std()
        move = move.repeat_interleave(self.shape[1], dim=0)
        own = F.one_hot(self.at.squeeze(1), self.ids.shape[1]).unsqueeze(-1)
        hook = table.register_forward_hook(lambda module, inputs, rows: rows + own * move.unsqueeze(1))
        try:
            return encoder(self.ids).last_hidden_state
        finally:
            hook.remove()

    def similarities(self, encodings, inverse):
        """Return r at the words' own tokens (w, p), r everywhere (w, p, n), and where the own tokens are, bool (w, p, n)."""
        grouped = encodings.unflatten(0, self.shape)
        own = F.one_hot(self.at.squeeze(1), self.ids.shape[1]).bool().unflatten(0, self.shape)
        targets = grouped[own].unflatten(0, self.shape).mean(dim=1)  # i*, (w, d)
        dual = targets @ inverse
        dual = dual / (dual * targets).sum(dim=1, keepdim=True)
        everywhere = torch.einsum("wpnd,wd->wpn", grouped, dual)
        return everywhere[own].unflatten(0, self.shape), everywhere, own


def text_losses(encoder, heads, ids, choices, numbers, generator):
    """Return the losses of a batch by name.

    Args:
        encoder, heads: text encoder, and one linear map for each kind of `CHOICES` and for "numbers".
        ids: token ids (b, n).
        choices, numbers: what the words stand for, (b, n, kinds) and (b, n, `NUM_NUMBERS`), as `words.ground` returns it.
        generator: the device's generator.
    """
    encodings = encoder(ids).last_hidden_state
    losses = {}
    for i, name in enumerate(CHOICES):
        target = choices[..., i].long()
        known = target >= 0
        losses[name] = F.cross_entropy(heads[name](encodings[known]), target[known])
    known = ~numbers.isnan()
    errors = (heads["numbers"](encodings) - numbers.nan_to_num()).square()
    losses["numbers"] = errors[known].mean()

    moment = second_moment(encodings)
    # Every direction is used alike: a metric with a small condition number, and no words in directions of a thousandth of the power.
    spread = torch.linalg.eigvalsh(regularised(moment / moment.trace() * len(moment), 1e-5))
    losses["spread"] = -spread.log().mean()

    part = len(ids) * 2 // 3 // 4 * 4
    words = NewWords.anywhere(ids[:part], noun_mask(choices)[:part], generator)
    changed = words.encode(encoder)
    at_own, everywhere, own = words.similarities(changed, torch.linalg.inv(regularised(moment, 1e-4)))
    losses["own"] = (at_own - 1).square().mean()
    losses["elsewhere"] = (everywhere[~own].abs() - 0.06).clamp_min(0).square().mean()
    # What changes behind a replaced noun, in parts of what changes at it.
    change = (changed - encodings[:part]).square().mean(-1)
    positions = torch.arange(ids.shape[1], device=ids.device)
    behind = positions > words.at
    losses["leakage"] = change[behind].mean() / change.gather(1, words.at).mean().clamp_min(1e-3)
    return losses


WEIGHTS = {"numbers": 3.0, "spread": 0.3, "own": 5.0, "elsewhere": 40.0, "leakage": 4.0}


def train_text_encoder(folder, tokenizer, ids, choices, numbers, *, width, batch_size, **budget):
    """Train the text encoder to tell, by one linear map of a word's encoding, what that word stands for in the picture.

    The same map serves the nouns of all superclasses, so that an identity that no word has is a direction, too. What a noun changes
    behind itself is held down, for nouns with random embeddings as well: those are what personalization trains.

    Args:
        folder: work folder.
        tokenizer: the world's.
        ids, choices, numbers: tensors (b, n, …), see `text_losses`; captions without a noun are not expected.
        width: features of an encoding.
        batch_size: captions a step.
        budget: `steps`, `minutes` and `save_every` of `train_stage`.
    """
    encoder = make_text_encoder(tokenizer, width=width)
    heads = nn.ModuleDict({name: nn.Linear(width, len(names)) for name, names in CHOICES.items()})
    heads["numbers"] = nn.Linear(width, NUM_NUMBERS)
    modules = nn.ModuleDict({"text": encoder, "heads": heads}).to(device())

    def batch_loss(step, progress, generator):
        rows = torch.randint(len(ids), (batch_size,), generator=generator, device=device()).cpu()
        batch = [tensor[rows].to(device()) for tensor in (ids, choices, numbers)]
        losses = text_losses(encoder, heads, batch[0], batch[1], batch[2].float(), generator)
        total = sum(WEIGHTS.get(name, 1.0) * loss for name, loss in losses.items())
        return total, {name: loss.detach() for name, loss in losses.items()}

    train_stage("text", folder, modules, batch_loss, peak=2e-3, report_every=50, **budget)
    return encoder


@torch.no_grad()
def separation(encoder, ids, choices, *, move=0.0, num_words=96, num_prompts=8, seed=0, num_captions=4000):
    """Measure how well the input covariance separates nouns, the library's way: ridge 1e-6, all positions.

    Args:
        encoder: text encoder.
        ids, choices: captions, (b, n) and (b, n, kinds).
        move: standard deviations by which the nouns' embeddings are moved, as training moves a concept's.
        num_words, num_prompts: so many nouns, each in so many prompts, in place of a noun of its own superclass.
        seed: which ones.
        num_captions: how many captions the covariance is computed from, at most half; the prompts are among the others.

    Returns:
        r at the own tokens (w, p), and the largest |r| at another token of the same prompt (w, p).
    """
    on, num_captions = encoder.device, min(num_captions, len(ids) // 2)
    moment = second_moment(encode_all(encoder, ids[:num_captions]))
    inverse = torch.linalg.inv(regularised(moment)).float()
    generator = torch.Generator().manual_seed(seed)
    ids, superclasses = ids[num_captions:], choices[num_captions:, :, list(CHOICES).index("superclass")]
    places = torch.nonzero(superclasses >= 0)  # (nouns, 2): row and position
    rows, nouns = [], []
    for first in torch.randperm(len(places), generator=generator)[:num_words].tolist():
        row, position = places[first]
        nouns.append(ids[row, position])
        alike = places[superclasses[places[:, 0], places[:, 1]] == superclasses[row, position]]
        rows.append(alike[torch.randperm(len(alike), generator=generator)[:num_prompts]])
    row, position = torch.cat(rows).unbind(1)
    words = NewWords(
        ids[row].to(on), position.unsqueeze(1).to(on), torch.stack(nouns).to(on), torch.full((num_words,), move, device=on),
        torch.Generator(on).manual_seed(seed),
    )  # fmt: skip
    at_own, everywhere, own = words.similarities(words.encode(encoder), inverse)
    return at_own, everywhere.masked_fill(own, 0).abs().amax(dim=-1)


@torch.no_grad()
def encode_all(encoder, ids):
    """Return the encodings (b, n, d) of token ids (b, n) in float64."""
    return torch.cat([encoder(part.to(encoder.device)).last_hidden_state.double() for part in ids.split(500)])


def condition_number(encoder, ids):
    """Return the condition number of the input covariance of captions' ids (b, n), with the library's ridge."""
    values = torch.linalg.eigvalsh(regularised(second_moment(encode_all(encoder, ids))))
    return (values[-1] / values[0]).item()
