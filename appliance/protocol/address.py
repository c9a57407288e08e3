"""Loopback addresses that stand for SEs and nodes on a controller: 127.1.0.1 is SE number 1.

Numbers are what code carries; an address always follows from a number and back. SE numbers run over
127.1.0.1 .. 127.127.255.255, node numbers over 127.128.0.1 .. 127.128.255.255 (DESIGN section 7; the source
document's example maps 127.1.0.1:5097 to an SE's localhost:22).
"""

from __future__ import annotations

from ipaddress import AddressValueError, IPv4Address

from appliance.errors import UsageError

REVERSE_PORT = 5097
"""TCP port of the reverse listener on an appliance."""

_SE_ZERO = int(IPv4Address("127.1.0.0"))
_NODE_ZERO = int(IPv4Address("127.128.0.0"))

MAX_SE_NUMBER = int(IPv4Address("127.127.255.255")) - _SE_ZERO
MAX_NODE_NUMBER = 0xFFFF


def se_address(number: int) -> str:
    """Returns the loopback address of SE `number` (1 .. MAX_SE_NUMBER)."""
    if not 1 <= number <= MAX_SE_NUMBER:
        raise UsageError(f"SE number {number} is outside 1..{MAX_SE_NUMBER}")
    return str(IPv4Address(_SE_ZERO + number))


def se_number(address: str) -> int | None:
    """Returns the SE number that `address` stands for, or None where it stands for none."""
    try:
        number = int(IPv4Address(address)) - _SE_ZERO
    except AddressValueError:
        return None
    return number if 1 <= number <= MAX_SE_NUMBER else None


def node_address(number: int) -> str:
    """Returns the loopback address of node `number` (1 .. MAX_NODE_NUMBER)."""
    if not 1 <= number <= MAX_NODE_NUMBER:
        raise UsageError(f"node number {number} is outside 1..{MAX_NODE_NUMBER}")
    return str(IPv4Address(_NODE_ZERO + number))


def parse_endpoint(text: str, *, default_port: int) -> tuple[str, int]:
    """Splits `host`, `host:port`, `[v6]` or `[v6]:port` into host and port.

    Raises:
        UsageError: empty host, or a port outside 0..65535 (0 asks the system for a free one).
    """
    host, port = text, str(default_port)
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise UsageError(f"{text!r} is no address", hint="write [address]:port for IPv6")
        port = rest[1:] or port
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{text!r} is no address", hint="write host:port, for example controller.example:8443")
    return host, int(port)


def format_endpoint(host: str, port: int) -> str:
    """Joins host and port, with brackets round an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
