"""The page: its tabs, and what they share."""

from collections.abc import Callable
from typing import Any

from perfusion_pytorch.app import evaluate_tab, generate_tab, look, train_tab
from perfusion_pytorch.app.shared import Page
from perfusion_pytorch.extras import required

# Each adds a tab to the page that is being built. One more tab is one more module here.
TABS: tuple[Callable[[Page], None], ...] = (generate_tab.add_tab, train_tab.add_tab, evaluate_tab.add_tab)
CACHE_SECONDS = (3600, 24 * 3600)  # how often uploads and pictures are looked at, and how old they may become


def build(page: Page) -> Any:
    """Return the page as gradio's Blocks, not served yet."""
    gradio = required("gradio")
    blocks = gradio.Blocks(title=look.TITLE, analytics_enabled=False, delete_cache=CACHE_SECONDS)
    with blocks as page.blocks:
        gradio.HTML(look.intro(page.models[0]))
        page.model = gradio.Dropdown(
            page.models,
            value=page.models[0],
            label="Base model",
            visible=len(page.models) > 1,
            elem_id="model",
        )
        with gradio.Tabs(selected="generate") as page.tabs:
            for add_tab in TABS:
                add_tab(page)
    return blocks
