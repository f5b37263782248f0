"""What keeps other web pages from using this one through the browser of somebody who has it open."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Guard:
    """Refuses requests that come from elsewhere, and tells browsers to load and frame nothing from elsewhere.

    A page of another origin can make a browser send requests here. Its name may even be made to point here (DNS
    rebinding); then the browser takes both for one, but `Host` still has that name. An address of digits cannot be
    rebound. And what a browser sends for a page of another origin has that in `Origin`.
    """

    def __init__(self, app: ASGIApp, names: Collection[str], content_security_policy: str) -> None:
        """Besides addresses of digits and `localhost`, `names` are what users may write in their address bar."""
        self._app = app
        self._names = {"localhost", *(name.lower() for name in names)}
        self._headers = {
            "Content-Security-Policy": content_security_policy,
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        reason = self._reason_to_refuse(Headers(scope=scope))
        if reason is None:
            await self._app(scope, receive, send_with_headers)
            return
        start = {"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"application/json")]}
        await send_with_headers(start)
        await send({"type": "http.response.body", "body": json.dumps({"error": reason}).encode()})

    def _reason_to_refuse(self, headers: Headers) -> str | None:
        host = headers.get("host", "")
        name = _host_name(host)
        if name not in self._names and not _is_address(name):
            return f"the page is not at the name {name[:60]!r}; use its address, or start it with allowed_hosts=[NAME]"
        origin = headers.get("origin")
        if origin is not None and origin.lower().partition("://")[2] != host.lower():  # always SCHEME://HOST, or null
            return "requests of other web pages are refused"
        return None


def _host_name(host: str) -> str:
    """A `Host` header without its port, in lower case; empty if it makes no sense."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
