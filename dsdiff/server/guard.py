"""A guard before all routes: who may ask, how much may be sent, and nothing that a page loads from elsewhere."""

import asyncio
import base64
import binascii
import secrets
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsdiff.server.options import LOCAL_NAMES, ServerOptions

# The page may load from this server alone; gradio's scripts and styles are partly inline.
CONTENT = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; object-src 'none'; frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
GONE: Message = {"type": "http.disconnect"}
LOOK = 0.2  # seconds between two looks whether the server is being stopped


class Guard:
    """An ASGI application in front of another.

    Refuses, with JSON: requests without the token, if there is one; those that other sites make a browser send, and
    those that reach a local server under another name (DNS rebinding); bodies above the limit. Streams, which the page
    holds open, end as `is_stopping` becomes true.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions, is_stopping: Callable[[], bool] = lambda: False):
        self.app, self.options, self.is_stopping = app, options, is_stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        assert scope["type"] == "http", "the server runs without websockets"
        refusal = self._refusal(Headers(scope=scope))
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        with suppress(ClientDisconnect):
            receive = self._until_stopped(receive) if scope["method"] == "GET" else self._limited(receive)
            await self.app(scope, receive, _with_headers(send))

    def _refusal(self, headers: Headers) -> Response | None:
        host = headers.get("host", "")
        if self.options.is_local and _name(host) not in (*LOCAL_NAMES, self.options.host):
            return _error(400, f"this server is not {host!r}: it answers as localhost alone")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return _error(403, f"{origin} is another site: its pages may not use this server")
        token = self.options.token
        if token is not None and not secrets.compare_digest(_given_token(headers).encode(), token.encode()):
            return _error(
                401,
                "give the server's token: Authorization: Bearer TOKEN, or as the password of any user",
                {"WWW-Authenticate": 'Basic realm="DSDiff: any user, the token as password"'},
            )
        if _number(headers.get("content-length", "0")) > self.options.limits.body:
            return _error(413, self._too_large)
        return None

    @property
    def _too_large(self) -> str:
        return f"a request may have {self.options.limits.body} bytes at most"

    def _until_stopped(self, receive: Receive) -> Receive:
        """Return `receive` that tells that the client has gone as the server is being stopped."""

        async def until_stopped() -> Message:
            message = asyncio.ensure_future(receive())
            try:
                while not (await asyncio.wait([message], timeout=LOOK))[0]:
                    if self.is_stopping():
                        return GONE
                return message.result()
            finally:
                message.cancel()

        return until_stopped

    def _limited(self, receive: Receive) -> Receive:
        """Return `receive` that refuses a body as it grows too long, which had not said how long it is.

        The application behind answers the HTTPException.
        """
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.options.limits.body:
                raise HTTPException(413, self._too_large)
            return message

        return limited


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return sending


def _name(host: str) -> str:
    """Return the name of a Host header without its port; "" for a header that is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _given_token(headers: Headers) -> str:
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value, validate=True).decode("utf-8", "replace").partition(":")[2]
    except binascii.Error:
        return ""


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdecimal() else 0


def _error(status: int, line: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": "refused", "detail": line, "errors": line}, status, headers)
