"""What requests the page's server takes: of this machine's browser and this page, and of bounded size.

gradio itself keeps file requests within its cache folder. This refuses what it would still do for others:
answer a web site whose name was pointed at this machine, take requests that another site's page sends,
fetch addresses of the network, and store uploads of any total size.
"""

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote, urlsplit

MOST_BYTES = 300 * 2**20  # of a request
REFUSED = re.compile(
    r"/gradio_api/(proxy=|file=\s*https?:|process_recording|vibe|undo-vibe|run-history|dev/)", re.I
)
LOCAL = ("127.0.0.1", "localhost", "::1")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """An ASGI middleware that refuses requests with 403, 411 or 413.

    Args:
        app: what takes the others.
        hosts: names that this server is known by; all, where it is empty.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...] = LOCAL) -> None:
        self.app = app
        self.hosts = hosts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Take a request, or refuse it."""
        refusal = self.refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            return await self.app(scope, receive, send)
        code, reason = refusal
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": code, "headers": headers})
        await send({"type": "http.response.body", "body": reason.encode()})

    def refusal(self, scope: MutableMapping[str, Any]) -> tuple[int, str] | None:
        """Return code and reason where a request is refused."""
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        host, origin = headers.get("host", ""), headers.get("origin")
        name = urlsplit(f"//{host}").hostname or ""
        if self.hosts and name not in self.hosts:
            return 403, f"This server is for {', '.join(self.hosts)}."
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "This server takes requests of its own page only."
        if REFUSED.search(unquote(scope["path"])):
            return 403, "The page does not use this."
        if scope["method"] in ("POST", "PUT", "PATCH"):
            length = headers.get("content-length", "")
            if not length.isdigit():
                return 411, "A request must say how long it is."
            if int(length) > MOST_BYTES:
                return 413, f"A request must have at most {MOST_BYTES // 2**20} MB."
        return None
