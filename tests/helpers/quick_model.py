"""The small model with few captions, so that a training of it starts soon."""

import json

from helpers.small_model import MODEL

COLOURS = ("red", "blue", "yellow", "white", "green")


def make_quick_model(folder):
    """Make the model's folder, with links to its parts, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in MODEL.iterdir():
        if part.name not in ("captions.txt", "perfusion_pytorch.json"):
            (folder / part.name).symlink_to(part)
    nouns = ("car", "bear", "house")
    lines = [f"a {a} {noun} on a {b} background" for a in COLOURS for b in COLOURS for noun in nouns]
    (folder / "captions.txt").write_text("\n".join(lines))
    notes = {"captions": "captions.txt", "templates": ["a {}", "a photo of a {}"]}
    (folder / "perfusion_pytorch.json").write_text(json.dumps(notes))
    return folder
