"""Fetch inputs by URL, only from hosts that the operator allows and only from public addresses.

The host is resolved once. All its addresses must be public, and the connection uses the resolved address, so a second
resolution cannot lead elsewhere (DNS rebinding). Every redirect is checked like the first URL.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import urljoin, urlsplit

from scail2_rt.runtime.serve.errors import wrong
from scail2_rt.runtime.serve.multipart import Receiver, Upload, too_large

REDIRECTS, SILENCE_S, TOTAL_S = 3, 10.0, 120.0
PIECE = 1 << 16
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def fetch(url: str, receiver: Receiver, hosts: tuple[str, ...], limit: int, name: str) -> Upload:
    """Fetch a URL into `receiver`. hosts: allowed hosts; name: the field, for messages. Raises Refusal: 400 for a host
    that is not allowed and for any failure, 413 for more than `limit` bytes."""
    deadline = time.monotonic() + TOTAL_S
    try:
        for _ in range(REDIRECTS + 1):
            moved = _get(url, receiver, hosts, limit, name, deadline)
            if moved is None:
                return receiver.done()
            url = urljoin(url, moved)
        raise wrong(f"{name}: the URL redirects more than {REDIRECTS} times. Give the final URL.", name)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        receiver.abort()
        raise wrong(f"{name}: the URL cannot be fetched ({type(error).__name__}). Upload the file.", name) from None
    except BaseException:
        receiver.abort()
        raise


def _get(url: str, receiver: Receiver, hosts: tuple[str, ...], limit: int, name: str, deadline: float) -> str | None:
    """Request a URL once: return the redirect's target, or None after the content was written."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".").lower()
    if parts.scheme not in ("http", "https") or parts.username is not None or not allowed(host, hosts):
        offered = f"only from {', '.join(hosts)}" if hosts else "from no host (its operator set no --allow-fetch)"
        raise wrong(f"{name}: the service fetches inputs {offered}. Upload the file.", name, "url_not_allowed")
    connection = _connect(host, parts.port, parts.scheme == "https", name)
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"User-Agent": "scail2-rt", "Accept-Encoding": "identity"})
        response = connection.getresponse()
        if response.status in (301, 302, 303, 307, 308):
            return response.headers.get("Location") or ""
        if response.status != 200:
            raise wrong(f"{name}: the URL answers with {response.status}. Check it, or upload the file.", name)
        received = 0
        while piece := response.read1(PIECE):
            received += len(piece)
            if received > limit:
                raise too_large(limit)
            if time.monotonic() > deadline:
                raise wrong(f"{name}: fetching the URL takes longer than {TOTAL_S:g} s. Upload the file.", name)
            receiver.write(piece)
        return None
    finally:
        connection.close()


def allowed(host: str, hosts: tuple[str, ...]) -> bool:
    """Whether `host` is one of `hosts`; `*.example.com` matches every subdomain of example.com."""
    return any(host == offer or (offer.startswith("*.") and host.endswith(offer[1:])) for offer in hosts)


def public_address(host: str, port: int, name: str) -> str:
    """Resolve a host and return its first address. Raises Refusal (400) if any of its addresses is not public."""
    found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for text in found:
        if not is_public(ipaddress.ip_address(str(text).partition("%")[0])):
            said = f"{name}: the host of the URL has an address that is not public. Upload the file."
            raise wrong(said, name, "url_not_allowed")
    return str(found[0])


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is global unicast. If an IPv6 address embeds an IPv4 address (mapped, 6to4, NAT64), that one
    is checked."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
    return address.is_global and not address.is_multicast


def _connect(host: str, port: int | None, secure: bool, name: str) -> http.client.HTTPConnection:
    port = port or (443 if secure else 80)
    if port not in (80, 443):
        raise wrong(f"{name}: only URLs on ports 80 and 443 are fetched. Upload the file.", name, "url_not_allowed")
    address = public_address(host, port, name)
    connection = http.client.HTTPConnection(host, port, timeout=SILENCE_S)
    connected = socket.create_connection((address, port), SILENCE_S)
    try:
        connection.sock = (
            ssl.create_default_context().wrap_socket(connected, server_hostname=host) if secure else connected
        )
    except BaseException:
        connected.close()
        raise
    return connection
