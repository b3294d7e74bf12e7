"""An image from an http(s) address: within ten seconds, of limited size, and never from a private network."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import threading
import time
from urllib.parse import quote, urljoin, urlsplit

from blip.data.image_header import MAX_BYTES
from blip.errors import UnreadableImage

SECONDS = 10.0
"""Most seconds for a download, redirections included."""
_REDIRECTIONS = 5
_SAFE = "/%:@!$&'()*+,;=~-._?"
"""Characters of a path or query that are sent as they are."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def download(address: str, seconds: float = SECONDS) -> bytes:
    """Download an image. UnreadableImage if it cannot be had, is too large, or is in a private network.

    The machine's proxy settings are not used, and no cookies or credentials are sent.
    """
    results: list[bytes | UnreadableImage] = []
    end = time.monotonic() + seconds

    def work() -> None:
        try:
            results.append(_follow(address, end))
        except UnreadableImage as error:
            results.append(error)
        except Exception as error:  # sockets, TLS, HTTP and names raise what they like
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            results.append(UnreadableImage("download", f"cannot be downloaded: {reason}"))

    # In a thread, because looking up a name has no time limit of its own.
    thread = threading.Thread(target=work, daemon=True, name="download")
    thread.start()
    thread.join(seconds)
    if not results:
        raise UnreadableImage("download", f"cannot be downloaded: it takes more than {seconds:g} seconds")
    if isinstance(results[0], UnreadableImage):
        raise results[0]
    return results[0]


def _follow(address: str, end: float) -> bytes:
    for _ in range(_REDIRECTIONS + 1):
        content, further = _get(address, end)
        if further is None:
            return content
        address = urljoin(address, further)
    raise UnreadableImage("download", f"is redirected more than {_REDIRECTIONS} times")


def _get(address: str, end: float) -> tuple[bytes, str | None]:
    """The content at an address, or where it is redirected to."""
    url = urlsplit(address)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if url.scheme not in kinds or not url.hostname:
        raise UnreadableImage("address", "is not an http or https address: download it first")
    connection = kinds[url.scheme](url.hostname, url.port, timeout=_left(end))
    connection._create_connection = _connect_in_public
    try:
        path = quote(url.path or "/", safe=_SAFE) + (f"?{quote(url.query, safe=_SAFE)}" if url.query else "")
        connection.request("GET", path, headers={"User-Agent": "openblip", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308) and (further := response.getheader("Location")):
            return b"", further
        if response.status != 200:
            raise UnreadableImage("download", f"cannot be downloaded: {response.status} {response.reason}")
        parts, size = [], 0
        while part := response.read(1 << 16):
            parts.append(part)
            size += len(part)
            if size > MAX_BYTES:
                raise UnreadableImage("too_many_bytes", f"more than the limit of {MAX_BYTES:,} bytes")
            _left(end)
        return b"".join(parts), None
    finally:
        connection.close()


def _left(end: float) -> float:
    """Seconds left. UnreadableImage if there are none."""
    if (left := end - time.monotonic()) <= 0:
        raise UnreadableImage("download", "cannot be downloaded: out of time")
    return left


def _connect_in_public(place: tuple[str, int], timeout: float, source: object = None) -> socket.socket:
    """Connect to an address of the public internet: checked where it is used, so that no later answer can differ."""
    problem: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(*place, type=socket.SOCK_STREAM):
        if not is_public(address[0]):
            raise UnreadableImage("address", f"is in a private network ({address[0]}): download it first")
        one = socket.socket(family, kind, protocol)
        try:
            one.settimeout(timeout)
            one.connect(address)
            return one
        except OSError as error:
            one.close()
            problem = error
    raise problem or OSError(f"{place[0]} has no address")


def is_public(address: str) -> bool:
    """Whether an IP address, or the one that it stands for, belongs to the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    inside = [ip]
    if isinstance(ip, ipaddress.IPv6Address):
        inside += [one for one in (ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())) if one is not None]
        if ip in _NAT64:
            inside.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if ip.ipv4_mapped is not None:
            inside.remove(ip)
    return all(one.is_global and not one.is_multicast for one in inside)
