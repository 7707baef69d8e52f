"""Settings that each are in their range, but of which a run would come to nothing: warned of at its start."""

import math
from collections.abc import Iterator

from perfusion_pytorch.layers.covariance import InputCovariance
from perfusion_pytorch.pipelines.parts import text_encoders_of
from perfusion_pytorch.protocols import StableDiffusion
from perfusion_pytorch.training.inputs import own_resolution
from perfusion_pytorch.training.options import TrainingOptions
from perfusion_pytorch.user_warnings import warn_user

NEARLY_SHUT = 0.1  # a gate that lets less of the concept through
HALF_OPEN = 0.5
MAX_PIECES = 3  # into which a tokenizer splits a word that its model knows
TOKENS_A_FEATURE = 10  # of the captions, below which a covariance is mostly noise
MAX_RATE, MIN_RATE = 1.0, 1e-5
LONG = 1000  # steps of a run that nobody wants to begin anew


def warn_of_settings(pipe: StableDiffusion, options: TrainingOptions) -> None:
    """Warn of options that cannot work, or hardly, on a pipeline."""
    for messages in (_of_gates, _of_rates, _of_files_and_pictures):
        for message in messages(options):
            warn_user(message)
    for message in (*_of_words(pipe, options.superclass), *_of_resolution(pipe, options.resolution)):
        warn_user(message)


def warn_of_covariance(covariance: InputCovariance) -> None:
    """Warn of an input covariance that was estimated from too little text."""
    num_tokens, dim = covariance.num_tokens, covariance.dim
    if 1 < num_tokens < TOKENS_A_FEATURE * dim:  # of a matrix, the number is not known, and 1
        warn_user(
            f"The covariance is of {num_tokens:,} tokens, which is too few for {dim} features: the edit will "
            "reach words that have nothing to do with the concept. Use thousands of captions; where none are "
            "given, there are 100,000 built-in ones."
        )


def _of_gates(options: TrainingOptions) -> Iterator[str]:
    for when, where in (("train", "while it is trained"), ("eval", "in pictures")):
        beta, temperature = (float(getattr(options, f"{when}_{name}")) for name in ("beta", "temperature"))
        names = f"`{when}_beta` {beta:g} with `{when}_temperature` {temperature:g}"
        if (own := gate(1.0, beta, temperature)) < NEARLY_SHUT:
            yield (
                f"{names} nearly shuts the gate at the concept's own token (to {own:.1e} of 1), so that "
                f"there is hardly an edit {where}. Choose a β below 1."
            )
        if (other := gate(0.0, beta, temperature)) > HALF_OPEN:
            yield (
                f"{names} opens the gate for every word ({other:.2f} of 1 where the concept is not), so "
                f"that all of a prompt is edited {where}. Choose a β above 0."
            )


def gate(similarity: float, beta: float, temperature: float) -> float:
    """Return how far a gate is open: σ((r − β) / τ).

    Example:
        >>> round(gate(1.0, 0.5, 0.05), 4), gate(1.0, 5.0, 0.001)
        (1.0, 0.0)
    """
    exponent = (similarity - beta) / temperature
    if exponent < 0:
        return math.exp(exponent) / (1 + math.exp(exponent))
    return 1 / (1 + math.exp(-exponent))


def _of_rates(options: TrainingOptions) -> Iterator[str]:
    embedding_steps = options.num_embedding_steps
    of_what = "the size of what it changes" if options.relative_learning_rates else "1"
    for name, what in (("learning_rate", "outputs"), ("embedding_learning_rate", "embedding")):
        rate = getattr(options, name)
        if rate > MAX_RATE:
            yield (
                f"`{name}` is {rate:g}: each step moves the {what} by more than {of_what}, so that nothing "
                "is learned. Relative rates near 0.04 are usual."
            )
        elif rate < MIN_RATE:
            yield (
                f"`{name}` is {rate:g}, so that the {what} will hardly change. Relative rates near 0.04 are "
                "usual."
            )
    phases = (embedding_steps, options.max_train_steps - embedding_steps)
    shortest = min(steps for steps in phases if steps > 0)
    if options.lr_warmup_steps >= shortest and options.lr_scheduler != "constant":
        yield (
            f"`lr_warmup_steps` is {options.lr_warmup_steps}, but a phase of this run has {shortest} steps, "
            "so that the learning rate never gets where it should. Choose fewer."
        )


def _of_files_and_pictures(options: TrainingOptions) -> Iterator[str]:
    if options.max_train_steps >= LONG and options.num_checkpoints == 0:
        yield (
            f"`checkpointing_steps` is {options.checkpointing_steps}, so that a run of "
            f"{options.max_train_steps} steps that is killed must begin anew. Choose a few hundred."
        )
    without = [prompt for prompt in options.validation_prompts if options.token not in prompt.lower()]
    if without:
        yield (
            f"`validation_prompt` should hold the token {options.token}, but not so {without}, which "
            "will show nothing of the concept."
        )


def _of_words(pipe: StableDiffusion, superclass: str) -> Iterator[str]:
    for _, tokenizer in text_encoders_of(pipe).values():
        for word in superclass.split():
            ids = tokenizer(word, add_special_tokens=False).input_ids
            if len(ids) < MAX_PIECES and tokenizer.unk_token_id not in ids:
                continue
            pieces = ", ".join(repr(piece) for piece in tokenizer.convert_ids_to_tokens(ids))
            yield (
                f"`superclass` should be words that the model knows well, but its tokenizer splits {word!r} "
                f"into {pieces}. Choose a more common word for the kind of thing."
            )
            return


def _of_resolution(pipe: StableDiffusion, resolution: int | None) -> Iterator[str]:
    own = own_resolution(pipe)
    if own is not None and resolution is not None and not own / 2 <= resolution <= own * 2:
        yield (
            f"`resolution` is {resolution}, but the model makes pictures of {own} pixels and knows little "
            "of other sizes. Leave it out."
        )
