"""The prompts of training pictures: from templates, or from captions with the concept's token in them."""

import re
from collections.abc import Sequence

from beartype import beartype

TEMPLATES = (
    "a {}",
    "the {}",
    "one {}",
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "a close photo of a {}",
    "a bright photo of the {}",
    "a good photo of a {}",
    "a clear picture of the {}",
    "a cropped photo of the {}",
    "this is a {}",
    "there is a {}",
    "here is the {}",
)


@beartype
def training_prompts(
    count: int,
    token: str,
    superclass: str,
    *,
    captions: Sequence[Sequence[str]] | None = None,
    templates: Sequence[str] = TEMPLATES,
) -> tuple[list[str], list[list[int]]]:
    """Return all prompts, each once, and for each picture the numbers of the prompts that it has.

    Args:
        count: the number of pictures.
        token: the concept's word in prompts.
        superclass: the kind of thing it is. In a caption without the token, the token replaces its first
            mention.
        captions: for each picture its captions; a picture without captions gets the templates.
        templates: texts with one {} each, for the token.

    Raises:
        ValueError: the templates are one text, a template has no {} or several, a caption names neither
            token nor superclass, or the counts differ.

    Example:
        >>> captions = [["A red Car on sand"], []]
        >>> training_prompts(2, "<car-1>", "car", captions=captions, templates=["a {}", "one {}"])
        (['a <car-1>', 'one <car-1>', 'A red <car-1> on sand'], [[2], [0, 1]])
    """
    if isinstance(templates, str):
        raise ValueError(
            f"`templates` must be a list of texts, got one text, {templates!r}. "
            f"Put it into a list: [{templates!r}]."
        )
    if not templates or any(template.count("{}") != 1 for template in templates):
        wrong = [template for template in templates if template.count("{}") != 1]
        raise ValueError(
            f"`templates` must be one or more texts with one {{}} each, for the concept's token, got {wrong}."
        )
    given = [()] * count if captions is None else captions
    if len(given) != count:
        raise ValueError(
            f"There must be captions for each of the {count} pictures, an empty list without any, "
            f"got {len(given)}."
        )
    filled = [template.replace("{}", token) for template in templates] if not all(given) else []
    texts_of_pictures = [[_with_token(text, token, superclass) for text in texts] for texts in given]
    prompts = list(dict.fromkeys([*filled, *(text for texts in texts_of_pictures for text in texts)]))
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    return prompts, [
        [numbers[text] for text in texts or dict.fromkeys(filled)] for texts in texts_of_pictures
    ]


def _with_token(caption: str, token: str, superclass: str) -> str:
    """Return a caption that holds the token, put in the place of the superclass if need be."""
    if token in caption:
        return caption
    words = r"\s+".join(map(re.escape, superclass.split()))
    text, found = re.subn(rf"(?<!\w){words}(?!\w)", lambda _: token, caption, count=1, flags=re.IGNORECASE)
    if not found:
        raise ValueError(
            f"A caption must name the concept, as {token!r} or as {superclass!r}, got {caption!r}."
        )
    return text
