"""What a daemon says to systemd and gets from it: readiness, watchdog, listening sockets.

Protocols of sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3), without libsystemd. Without systemd all of it
does nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping

from appliance.errors import SettingsError

_FIRST_FD = 3


def notify(state: str, *, environ: Mapping[str, str] = os.environ) -> bool:
    """Sends `state` (lines such as `READY=1`, `STOPPING=1`, `WATCHDOG=1`, `STATUS=…`) to the service manager.

    Returns:
        Whether it was sent; False without a manager. Never raises: readiness isn't worth a crash.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            # A manager that doesn't read must not hold up the daemon.
            channel.setblocking(False)
            channel.sendto(state.encode(), address)
    except OSError:
        return False
    return True


def watchdog_interval_s(*, environ: Mapping[str, str] = os.environ) -> float | None:
    """Returns how often to send `WATCHDOG=1`, seconds: half of what the unit allows. None where nobody waits for it."""
    allowed_us, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not allowed_us.isdecimal() or int(allowed_us) == 0 or pid not in {"", str(os.getpid())}:
        return None
    return int(allowed_us) / 2e6


def watchdog_limit(allowed_s: float | None = None, *, environ: Mapping[str, str] = os.environ) -> str:
    """Returns the lines that feed the watchdog and say how long it shall wait for the next time; "" without one.

    For a process that replaces itself: until the new program feeds it, nobody does, and on a slow machine a start takes
    longer than a hang may (sd_notify(3), WATCHDOG_USEC).

    Args:
        allowed_s: how long; None takes what the unit says.
        environ: of this process.
    """
    if watchdog_interval_s(environ=environ) is None:
        return ""
    allowed_us = environ["WATCHDOG_USEC"] if allowed_s is None else str(int(allowed_s * 1e6))
    return f"\nWATCHDOG=1\nWATCHDOG_USEC={allowed_us}"


def listen_fds(*, environ: MutableMapping[str, str] = os.environ) -> dict[str, socket.socket]:
    """Takes the listening sockets that systemd opened for this process, by their `FileDescriptorName`.

    The variables are taken out of the environment, so that a second call returns nothing and no child is misled. The
    sockets are made close-on-exec and non-blocking mode is left to the caller.

    Raises:
        SettingsError: two sockets of one name, or something that is no socket.
    """
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return {}
    found: dict[str, socket.socket] = {}
    problem = ""
    for position in range(int(count)):
        descriptor = _FIRST_FD + position
        name = names[position] if position < len(names) and names[position] else "unknown"
        try:
            os.set_inheritable(descriptor, False)
            listener = socket.socket(fileno=descriptor)
        except OSError as error:
            problem = f"descriptor {descriptor} ({name!r}) from systemd is no socket: {error.strerror}"
            continue
        if name in found:
            problem = f"systemd handed over two sockets named {name!r}"
            listener.close()
        else:
            found[name] = listener
    if problem:
        for listener in found.values():
            listener.close()
        raise SettingsError(problem, hint="each .socket unit has one ListenStream and its own FileDescriptorName")
    return found
