"""What training pictures are called: prompt templates, captions with the concept's token."""

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
    """Return all prompts, each once, and for each picture the numbers of those that it may be trained with.

    Args:
        count: how many pictures there are.
        token: the concept's word in prompts.
        superclass: what it is one of; in a caption without the token, the token takes the place of its first mention.
        captions: for each picture its captions; a picture without one has the templates.
        templates: texts with one {} each, for the token.

    Raises:
        ValueError: a template has no {} or several, a caption names neither token nor superclass, or the counts differ.

    Example:
        >>> training_prompts(2, "<car-1>", "car", captions=[["A red Car on sand"], []], templates=["a {}", "one {}"])
        (['a <car-1>', 'one <car-1>', 'A red <car-1> on sand'], [[2], [0, 1]])
    """
    if not templates or any(template.count("{}") != 1 for template in templates):
        wrong = [template for template in templates if template.count("{}") != 1]
        raise ValueError(
            f"`templates` must be one or more texts with one {{}} each, for the concept's token, got {wrong}."
        )
    captions = [[] for _ in range(count)] if captions is None else captions
    if len(captions) != count:
        raise ValueError(
            f"There must be captions for each of the {count} pictures, an empty list without any, got {len(captions)}."
        )
    prompts = (
        dict.fromkeys(template.replace("{}", token) for template in templates) if not all(captions) else {}
    )
    of_templates = list(range(len(prompts)))
    of_pictures = []
    for texts in captions:
        texts = [_with_token(text, token, superclass) for text in texts]
        prompts |= dict.fromkeys(texts)
        of_pictures.append(texts)
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    return list(prompts), [[numbers[text] for text in texts] or of_templates for texts in of_pictures]


def _with_token(caption, token, superclass):
    if token in caption:
        return caption
    words = r"\s+".join(map(re.escape, superclass.split()))
    text, found = re.subn(rf"(?<!\w){words}(?!\w)", lambda _: token, caption, count=1, flags=re.IGNORECASE)
    if not found:
        raise ValueError(
            f"A caption must name the concept, as {token!r} or as {superclass!r}, got {caption!r}."
        )
    return text
