"""The code blocks of the README and of the pages in `docs/`."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language):
    """Return the code blocks of a page that are marked with a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page):
    """Return the command lines of a page's bash blocks, each as a list of words."""
    lines = [
        line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").strip().split("\n")
    ]
    return [shlex.split(command, comments=True) for line in lines for command in line.split(" && ")]


def name_of(page):
    """Return a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()
