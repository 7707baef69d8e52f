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
    return moment + ridge * moment.trace() / width * torch.eye(width, dtype=moment.dtype, device=moment.device)


class NewWords(nn.Module):
    """Prompts in which a noun is replaced by a word that has yet to be learned: its embedding is a noun's, moved at random.

    Every word is used in several prompts; their mean encoding is its target input i*, as the library computes it.
    """

    def __init__(self, ids, is_noun, generator, *, num_words, num_prompts, largest_move=2.0):
        super().__init__()
        on, rows = ids.device, torch.arange(num_words * num_prompts, device=ids.device) % len(ids)
        self.at = torch.multinomial(is_noun[rows].float(), 1, generator=generator)  # (w · p, 1)
        nouns = ids[is_noun]
        chosen = nouns[torch.randint(len(nouns), (num_words,), generator=generator, device=on)]
        self.ids = ids[rows].scatter(1, self.at, chosen.repeat_interleave(num_prompts).unsqueeze(1))
        self.rows, self.shape = rows, (num_words, num_prompts)
        self.size = largest_move * torch.rand(num_words, 1, generator=generator, device=on)
        self.generator = generator

    def encode(self, encoder):
        """Return the encodings (w · p, n, d) of the prompts."""
        table = encoder.get_input_embeddings()
        noise = torch.randn(len(self.size), table.embedding_dim, generator=self.generator, device=self.ids.device)
        move = (self.size * noise * table.weight.detach().std()).repeat_interleave(self.shape[1], dim=0)
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

    words = NewWords(ids, noun_mask(choices), generator, num_words=len(ids) // 6, num_prompts=4)
    changed = words.encode(encoder)
    at_own, everywhere, own = words.similarities(changed, torch.linalg.inv(regularised(moment, 1e-4)))
    losses["own"] = (at_own - 1).square().mean()
    losses["elsewhere"] = (everywhere[~own].abs() - 0.08).clamp_min(0).square().mean()
    # What changes behind a replaced noun, in parts of what changes at it.
    change = (changed - encodings[words.rows]).square().mean(-1)
    positions = torch.arange(ids.shape[1], device=ids.device)
    behind = positions > words.at
    losses["leakage"] = change[behind].mean() / change.gather(1, words.at).mean().clamp_min(1e-3)
    return losses


WEIGHTS = {"numbers": 3.0, "spread": 0.3, "own": 5.0, "elsewhere": 20.0, "leakage": 4.0}


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
        num_words, num_prompts: so many nouns, each in so many prompts.
        seed: which ones.
        num_captions: how many captions the covariance is computed from.

    Returns:
        r at the own tokens (w, p), and the largest |r| at another token of the same prompt (w, p).
    """
    on = encoder.device
    moment = torch.zeros(encoder.config.hidden_size, encoder.config.hidden_size, dtype=torch.float64, device=on)
    for part in ids[:num_captions].to(on).split(500):
        rows = encoder(part).last_hidden_state.double().flatten(0, 1)
        moment += rows.T @ rows / len(ids[:num_captions]) / ids.shape[1]
    inverse = torch.linalg.inv(regularised(moment)).float()
    generator = torch.Generator(on).manual_seed(seed)
    ids, is_noun = ids[-num_words * num_prompts :].to(on), noun_mask(choices)[-num_words * num_prompts :].to(on)
    words = NewWords(ids, is_noun, generator, num_words=num_words, num_prompts=num_prompts)
    words.size = torch.full_like(words.size, move)
    at_own, everywhere, own = words.similarities(words.encode(encoder), inverse)
    return at_own, everywhere.masked_fill(own, 0).abs().amax(dim=-1)


def condition_number(encoder, ids):
    """Return the condition number of the input covariance of captions' ids (b, n), with the library's ridge."""
    with torch.no_grad():
        rows = torch.cat([encoder(part).last_hidden_state.double() for part in ids.to(encoder.device).split(500)])
    values = torch.linalg.eigvalsh(regularised(second_moment(rows)))
    return (values[-1] / values[0]).item()
