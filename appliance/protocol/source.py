"""Source networks of an image key: what may be written, and whether an address is in them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address, ip_network


def is_allowed(source: str, networks: tuple[str, ...]) -> bool:
    """Whether `source` (an address as text) is in one of `networks`, which passed `check_networks`; none allow all."""
    if not networks:
        return True
    try:
        address = ip_address(source)
    except ValueError:
        return False
    # A listener on [::] sees IPv4 clients as ::ffff:a.b.c.d; the operator wrote a.b.c.0/24.
    mapped = getattr(address, "ipv4_mapped", None)
    return any((mapped or address) in ip_network(network) for network in networks)


def check_networks(networks: Sequence[str]) -> list[str]:
    """Returns what is wrong with an image key's source networks, one sentence each; empty where they hold.

    A key is refused when it is made, not each time it is used.
    """
    problems = []
    for network in networks:
        try:
            ip_network(network)
        except ValueError as error:
            problems.append(f"network {network!r}: {error}; write a network such as 192.0.2.0/24")
    return problems
