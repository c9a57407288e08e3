"""Loopback addresses that stand for SEs and nodes on a controller: 127.1.0.1 is SE number 1.

Numbers are what code carries; an address always follows from a number and back. SE numbers run over
127.1.0.1 .. 127.127.255.255, node numbers over 127.128.0.1 .. 127.128.255.255 (DESIGN section 7; the source
document's example maps 127.1.0.1:5097 to an SE's localhost:22).
"""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address, IPv6Address

from appliance.errors import UsageError

REVERSE_PORT = 5097
"""TCP port of the reverse listener on an appliance."""

_SE_ZERO = int(IPv4Address("127.1.0.0"))
_NODE_ZERO = int(IPv4Address("127.128.0.0"))

MAX_SE_NUMBER = int(IPv4Address("127.127.255.255")) - _SE_ZERO
MAX_NODE_NUMBER = 0xFFFF

_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,251}[A-Za-z0-9.])?")
_PORT = re.compile(r"[0-9]{1,5}")


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
    """Splits `host`, `host:port`, `v6`, `[v6]` or `[v6]:port` into host and port.

    A host is a name, an IPv4 or an IPv6 address: nothing that could mean something else to whoever it is passed to
    (an option, a URL, a header line).

    Raises:
        UsageError: anything else, or a port outside 0..65535 (0 asks the system for a free one).
    """
    host, port, hint = text, str(default_port), "write host:port, for example controller.example:8443"
    if text.startswith("["):
        hint = "write [address]:port for IPv6, for example [2001:db8::1]:8443"
        host, _, rest = text[1:].partition("]")
        port = rest.removeprefix(":") if rest else port
        named = _is_v6(host) and rest[:1] in {"", ":"} and text.count("]") == 1
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
        named = _HOST.fullmatch(host) is not None
    else:
        named = _HOST.fullmatch(host) is not None or _is_v6(host)
    if not named or not _PORT.fullmatch(port) or int(port) > 65535:
        raise UsageError(f"{text!r} is no address", hint=hint)
    return host, int(port)


def _is_v6(host: str) -> bool:
    try:
        IPv6Address(host)
    except AddressValueError:
        return False
    return True


def format_endpoint(host: str, port: int) -> str:
    """Joins host and port, with brackets round an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
