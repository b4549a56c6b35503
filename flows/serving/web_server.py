"""Prefect's server for the pages and commands of one user: `python -m flows.serving.web_server PORT`, on 127.0.0.1.

As `prefect server start`, with a check in front of it. Loopback alone is no protection: a page from elsewhere in the
user's browser can send requests to any port of this machine, and its own host name can lead there (DNS rebinding). So
the Host of a request must be this machine, and its Origin a page of this server. The page ENTER logs a browser in.
"""

import os
import sys
from base64 import b64encode
from hashlib import sha256

import uvicorn
from prefect.server.api.server import create_app
from prefect.settings import get_current_settings
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flows.serving.home import ENTER

HOST = "127.0.0.1"
NAMES = (HOST, "localhost", "[::1]")  # the last: of a tunnel from another machine
SAFE = ("GET", "HEAD", "OPTIONS")
# Where both of Prefect's UIs look for the password. What follows `#` never leaves the browser, so no log has it.
SCRIPT = """
const login = location.hash.slice(1);
if (/^[A-Za-z0-9+/=]+$/.test(login)) localStorage.setItem("prefect-password", login);
location.replace("/runs");
"""
PAGE = f"<!doctype html><meta charset=utf-8><title>Prefect</title><script>{SCRIPT}</script>"
_HASH = b64encode(sha256(SCRIPT.encode()).digest()).decode()
HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{_HASH}'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}


class OwnPages:
    """Passes on the requests of this server's own pages, and those of programs, which name no page: 403 for the others."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app = app
        self.origins = {f"http://{name}:{port}" for name in NAMES}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif not self.is_own(scope):
            await PlainTextResponse("This server answers its own pages only.", 403)(scope, receive, send)
        elif scope["type"] == "http" and scope["path"] == ENTER:
            await HTMLResponse(PAGE, headers=HEADERS)(scope, receive, send)
        else:
            await self.app(scope, receive, _unframed(send))

    def is_own(self, scope: Scope) -> bool:
        """Whether no page from elsewhere sent a request. Browsers name the page in `Origin`, other programs have none."""
        headers = Headers(scope=scope)
        origins = headers.getlist("origin")
        if origins:
            # The Host is this machine's: a tunnel may have another port there.
            return all(origin in self.origins or origin == f"http://{headers.get('host')}" for origin in origins)
        site = headers.get("sec-fetch-site", "none")
        return site in ("none", "same-origin") or scope.get("method") in SAFE


def _unframed(send: Send) -> Send:
    """`send` for answers that no other site may show in a frame, where its visitor would click without knowing."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).setdefault("X-Frame-Options", "SAMEORIGIN")
        await send(message)

    return sent


def guarded(app: ASGIApp, port: int) -> ASGIApp:
    """An app that answers under this machine's names alone, and its own pages."""
    return TrustedHostMiddleware(OwnPages(app, port), NAMES, www_redirect=False)


def main(port: int) -> None:
    """Serve until a signal, as `prefect server start --port PORT`."""
    os.umask(0o077)  # the database is created readable by all otherwise
    server = get_current_settings().server
    uvicorn.run(
        guarded(create_app(final=True), port),
        host=HOST,
        port=port,
        timeout_keep_alive=server.api.keepalive_timeout,
        ws_ping_interval=server.api.websocket_ping_interval,
        ws_ping_timeout=server.api.websocket_ping_timeout,
        log_level=server.logging_level.lower(),
    )
    os._exit(0)  # all is closed; the last run waits for this end, and to take the modules down takes 0.9 s


if __name__ == "__main__":
    main(int(sys.argv[1]))
