"""Which ``Host`` and ``Origin`` a service on this machine answers to.

A service that listens on the loopback address trusts whoever reaches it. A web page of another site must not count as
that: a browser would send it requests, and by a host name that leads to 127.0.0.1 (DNS rebinding) read the replies.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.settings import is_loopback

Headers = Sequence[tuple[bytes, bytes]]


class OriginCheck:
    """The check of one part.

    Args:
        host: the address that the part listens on; beyond this machine, keys or a proxy do this work.
        allowed_hosts: further names under which a proxy on this machine is reached.
        cors_origins: web pages that may call the part.
    """

    def __init__(self, host: str, allowed_hosts: Sequence[str] = (), cors_origins: Sequence[str] = ()) -> None:
        self._is_on = is_loopback(host)
        self._hosts = frozenset(name.lower() for name in allowed_hosts)
        self._origins = frozenset(cors_origins)

    def check(self, headers: Headers) -> None:
        """Check the headers of a request.

        Raises:
            ApiError: 403, ``bad_origin``.
        """
        if not self._is_on:
            return
        found = {name: value.decode("latin-1") for name, value in headers if name in (b"host", b"origin")}
        host, origin = found.get(b"host", ""), found.get(b"origin")
        if not self._is_own(host):
            raise ApiError(
                "bad_origin",
                "This server answers to the names of its own machine. Behind a proxy, set allowed_hosts=[NAME].",
            )
        if origin is None or origin in self._origins or "*" in self._origins:
            return
        try:
            netloc = urlsplit(origin).netloc.lower()
        except ValueError:
            netloc = ""
        if netloc != host.lower():
            message = "Web pages of other sites may not call this server. To allow one, set cors_origins=[ORIGIN]."
            raise ApiError("bad_origin", message)

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return is_loopback(name) or name in self._hosts
