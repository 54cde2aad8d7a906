"""Fetch an image by URL from hosts that the operator allows, never from private addresses.

A server that fetches arbitrary URLs can be used to attack the hospital's own network (SSRF). Therefore host names must
be on a list. Every address that a name resolves to is checked, and the connection goes to the checked address, so a
second DNS answer cannot replace it. Redirects pass the same checks. Size and time are limited. Proxies from the
environment are not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Callable, Iterable
from urllib.parse import urljoin, urlsplit

import httpcore

from babydoctor.serve.api.errors import ApiError
from babydoctor.serve.settings import RemoteImages

MAX_REDIRECTS = 3

AddressCheck = Callable[[str], bool]


def is_public(address: str) -> bool:
    """True for an IP address of the public internet, including an IPv4 address embedded in an IPv6 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if wrapped is not None:
            ip = wrapped
        elif ip in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not ip.is_multicast


def _refused(message: str) -> ApiError:
    return ApiError("image_url_refused", message, param="messages")


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Resolves names itself and connects only to addresses that pass the check."""

    def __init__(self, is_allowed: AddressCheck) -> None:
        self._is_allowed = is_allowed
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            raise _refused("The image's host name does not resolve.") from None
        addresses = list(dict.fromkeys(str(item[4][0]) for item in found))
        if not addresses or not all(self._is_allowed(address) for address in addresses):
            raise _refused("The image's host is not on the public internet.")
        for address in addresses[:-1]:
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
        return await self._backend.connect_tcp(addresses[-1], port, timeout, local_address, socket_options)


async def fetch_image(url: str, settings: RemoteImages, is_allowed: AddressCheck = is_public) -> bytes:
    """Download an image.

    Args:
        is_allowed: which IP addresses may be connected to.

    Raises:
        ApiError: 422 if the URL is not allowed or the download fails, 413 if the image is too large.
    """
    if not settings.hosts:
        raise _refused("Images by URL are off on this server; send the image itself as a data URL.")
    try:
        return await asyncio.wait_for(_follow(url, settings, is_allowed), settings.timeout_s)
    except (TimeoutError, asyncio.TimeoutError):
        raise _refused(f"The image did not arrive within {settings.timeout_s:g} s.") from None
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException):
        raise _refused("The image could not be downloaded from its host.") from None


async def _follow(url: str, settings: RemoteImages, is_allowed: AddressCheck) -> bytes:
    async with httpcore.AsyncConnectionPool(network_backend=_CheckedBackend(is_allowed)) as pool:
        for _ in range(MAX_REDIRECTS + 1):
            url = _check_url(url, settings)
            async with pool.stream("GET", url, headers={"Accept": "image/*, application/dicom"}) as response:
                if response.status in (301, 302, 303, 307, 308):
                    headers = {name.lower(): value for name, value in response.headers}
                    url = urljoin(url, headers.get(b"location", b"").decode("latin-1"))
                    continue
                if response.status != 200:
                    raise _refused(f"The image's host answered {response.status}.")
                return await _read(response, settings.max_bytes)
        raise _refused(f"The image's URL redirects more than {MAX_REDIRECTS} times.")


def _check_url(url: str, settings: RemoteImages) -> str:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _refused("The image's URL is not valid.") from None
    if parts.scheme not in ("http", "https") or not url.isascii() or parts.username or parts.password:
        raise _refused("The image's URL must be a plain http or https URL.")
    host = (parts.hostname or "").lower()
    # If the URL has a port, the list must have it too, because the port may belong to another service on that host.
    named = host if port is None else f"{host}:{port}"
    if named not in {allowed.lower() for allowed in settings.hosts}:
        raise _refused("This server may not read images from that host; send the image as a data URL.")
    return url


async def _read(response: httpcore.Response, max_bytes: int) -> bytes:
    data = bytearray()
    async for part in response.aiter_stream():
        data += part
        if len(data) > max_bytes:
            raise ApiError("image_too_large", f"The image is larger than {max_bytes} bytes.", param="messages")
    return bytes(data)
