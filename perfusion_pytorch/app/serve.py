"""Serve the page, on this machine alone unless told otherwise."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perfusion_pytorch.app import look
from perfusion_pytorch.app.guard import LOCAL, Guard
from perfusion_pytorch.app.page import build
from perfusion_pytorch.app.shared import Page
from perfusion_pytorch.app.uploads import MOST_BYTES
from perfusion_pytorch.extras import required

HOST = "127.0.0.1"


def prepare(folder: Path) -> Path:
    """Make the folder for uploads and pictures, and let gradio use no other one. Call it before `serve`.

    Returns:
        The folder, resolved.

    Raises:
        OSError: it cannot be made.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_EXAMPLES_CACHE"] = str(folder / "examples")  # gradio serves this folder too
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    return folder


def serve(page: Page, *, host: str = HOST, port: int | None = None) -> tuple[str, Callable[[], None]]:
    """Build and serve a page until it is closed.

    Args:
        page: with its folder from `prepare`.
        host: the address to listen on.
        port: by default the first free one from 7860.

    Returns:
        The page's address, and a function that closes it: the run that is going on is stopped first.

    Raises:
        OSError: the port is not free.
    """
    middleware: Any = required("starlette.middleware").Middleware
    blocks = build(page)
    guard = middleware(Guard, hosts=LOCAL if host in LOCAL else ())
    _, url, _ = blocks.queue().launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        theme=look.theme(),
        css=look.CSS,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        max_file_size=MOST_BYTES,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        app_kwargs={"middleware": [guard]},
    )

    def close() -> None:
        page.runs.close()
        blocks.close(verbose=False)

    return url, close
