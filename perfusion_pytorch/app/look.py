"""How the page looks: a theme without fonts from the network, some CSS, and texts as HTML."""

from html import escape
from typing import Any

from perfusion_pytorch.extras import required

TITLE = "Perfusion"
FONTS = ["ui-sans-serif", "system-ui", "sans-serif"]
MONO = ["ui-monospace", "monospace"]
SMALL = 256  # pixels; pictures below are shown pixel by pixel
CSS = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.intro h1 { margin: 0; font-size: 1.5rem; }
.intro p { margin: .1rem 0 0; opacity: .75; }
.words { font-size: 1.15rem; line-height: 2.6; }
.word { position: relative; border-radius: 6px; padding: 3px 5px; cursor: help; }
.word.open { text-decoration: underline; text-decoration-thickness: 2px; text-underline-offset: 4px; }
.word small { position: absolute; left: 50%; top: 100%; transform: translateX(-50%); font-size: .65rem;
  line-height: 1.2; color: var(--body-text-color-subdued); }
.keys { margin-top: .7rem; font-size: .8rem; color: var(--body-text-color-subdued); }
.key { margin-right: 1.2em; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 3px; margin-right: .4em; }
.note { border-left: 4px solid var(--color-accent); padding: .35rem .8rem; margin: .3rem 0;
  background: var(--background-fill-secondary); border-radius: 4px; overflow-wrap: anywhere; }
.note.wrong { border-color: #dc2626; }
.bar { height: 8px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
.bar div { height: 100%; background: var(--color-accent); transition: width .5s; }
.small-pixels img { image-rendering: pixelated; }
.picture img { width: 100% !important; height: 100% !important; object-fit: contain !important; }
.caption { font-size: .85rem; color: var(--body-text-color-subdued); }
.below-buttons img { padding-top: 36px; }
.caption p { margin: .4rem 0; }
.figures { overflow-x: auto; }
.figures table { border-collapse: collapse; font-size: .85rem; width: 100%;
  font-variant-numeric: tabular-nums; }
.figures table, .figures th, .figures td, .figures tr { border: 0 !important; }
.figures th { text-align: left; font-weight: 500; padding: .3rem .4rem; }
.figures thead th { color: var(--body-text-color-subdued); cursor: help; }
.figures td, .figures thead th + th { text-align: right; padding: .3rem .4rem; }
.figures td { white-space: nowrap; }
.figures tbody tr { border-top: 1px solid var(--border-color-primary) !important; }
.figures small { color: var(--body-text-color-subdued); }
.figures .chosen { background: var(--color-accent-soft); }
.figures .chosen th { font-weight: 700; }
.slot { align-items: stretch; }
.slot button { height: auto; }
.slot .min_value, .slot .max_value { display: none; }
"""


def theme() -> Any:
    """Return the page's theme."""
    return required("gradio").themes.Soft(font=FONTS, font_mono=MONO, spacing_size="sm")


def intro(model: str) -> str:
    """Return the page's head."""
    return (
        f'<div class="intro"><h1>{TITLE}</h1>'
        f"<p>Teach {escape(model)} a new object from some pictures, and put it into others.</p></div>"
    )


def note(*sentences: str, is_wrong: bool = False) -> str:
    """Return sentences as notes, in which nothing is markup.

    Example:
        >>> note("a < b")
        '<div class="note">a &lt; b</div>'
    """
    kind = "note wrong" if is_wrong else "note"
    return "".join(f'<div class="{kind}">{escape(sentence)}</div>' for sentence in sentences)


def caption(text: str) -> str:
    """Return a text that stands under a picture."""
    return f'<div class="caption">{escape(text)}</div>'


def kinds_of_picture(edge: int) -> list[str]:
    """Return the CSS classes of a picture from a model whose own have so many pixels."""
    return ["picture", "small-pixels"] if edge < SMALL else ["picture"]


def progress_bar(done: int, last: int) -> str:
    """Return a bar that shows how many steps are done."""
    return f'<div class="bar"><div style="width: {100 * done / max(1, last):.1f}%"></div></div>'
