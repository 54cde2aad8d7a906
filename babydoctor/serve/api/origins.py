"""Check the ``Host`` and ``Origin`` headers of requests to a server on the loopback address.

Such a server trusts every caller, because only programs on this machine reach it. But a web page of another site can
make the browser send requests to it, and can read the replies if its host name resolves to 127.0.0.1 (DNS rebinding).
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.settings import is_loopback

Headers = Sequence[tuple[bytes, bytes]]


class OriginCheck:
    """The check of one server.

    Args:
        host: the address that the server listens on. If it is not loopback, nothing is checked: keys or a proxy must
            protect the server.
        allowed_hosts: further host names, those of a proxy on this machine.
        cors_origins: origins of web pages that may call the server.
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
                "This server only answers to names of its own machine. Behind a proxy, set allowed_hosts=[NAME].",
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
