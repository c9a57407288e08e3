"""Free TCP ports for a lab.

They are taken below the kernel's range for outgoing connections, so that no connection can sit on one between being
chosen and being listened on, and at random, so that two labs made at once rarely want the same.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path

from appliance.lab.layout import LabError

_FIRST = 10_240
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES = 2000


def _last() -> int:
    try:
        lowest = int(_RANGE.read_text("ascii").split()[0])
    except (OSError, ValueError, IndexError):
        lowest = 32_768
    return lowest - 1 if lowest > _FIRST + _TRIES else 65_535


def is_free(port: int) -> bool:
    """Whether nobody listens on `port`, on any address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what lingers from a lab that ended doesn't count
        try:
            probe.bind(("0.0.0.0", port))  # noqa: S104 - a probe that never listens
        except OSError:
            return False
    return True


def free_ports(
    count: int, *, taken: Collection[int] = (), choose: Callable[[int, int], int] = random.randint
) -> list[int]:
    """Returns `count` different ports nobody listens on, none of `taken`. Raises `LabError` where there are too few."""
    last = _last()
    found: list[int] = []
    with ExitStack() as held:
        for _ in range(_TRIES + count):
            if len(found) == count:
                return found
            port = choose(_FIRST, last)
            probe = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            if port in taken or port in found:
                continue
            try:
                probe.bind(("0.0.0.0", port))  # noqa: S104 - held until all are found, never listens
            except OSError:
                continue
            found.append(port)
    raise LabError(f"fewer than {count} TCP ports are free between {_FIRST} and {last}", hint="end other labs first")
