"""The SE attacks the gateway with its own key: what a thief of it could try must be refused before this SE says UP.

    on the wire                              stands for
    a session channel                        shell, exec, sftp, agent and X11 forwarding: requests on such a channel
                                             (RFC 4254 section 6); each is tried where the channel is granted
    a direct-tcpip channel to a foreign      everything behind the controller
    destination
    tcpip-forward of another SE's address    taking that SE's place

Once a link, after confirm, when the link may do most; all of it at once, so it costs one round trip. What is granted is
given back at once. The first heartbeat tells the controller, and the link doesn't become UP. The gateway expects these
three refusals of each link and counts them apart (`controller.tunnel`); the self-test isn't announced to it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from appliance.protocol.address import REVERSE_PORT, se_address
from appliance.protocol.tunnel import SELF_TEST_CHANNEL, Door

_SESSION_REQUESTS: Sequence[tuple[Door, str, tuple[str, ...]]] = (
    (Door.SHELL, "shell", ()),
    (Door.EXEC, "exec", ("true",)),
    (Door.SFTP, "subsystem", ("sftp",)),
    (Door.AGENT, "auth-agent-req@openssh.com", ()),
)


class Attacked(Protocol):
    """What the self-test needs of a connection. Each raises `TunnelError` where the link ends meanwhile."""

    def grants_session(self) -> bool:
        """Whether a session channel is granted."""
        ...

    def grants_request(self, request: str, fields: Sequence[str]) -> bool:
        """Whether a request on a session channel is granted; `fields` are strings that go with it."""
        ...

    def grants_x11(self) -> bool:
        """Whether X11 forwarding is granted on a session channel."""
        ...

    def grants_channel(self, host: str, port: int) -> bool:
        """Whether a `direct-tcpip` channel is granted."""
        ...

    def grants_listen(self, address: str, port: int) -> bool:
        """Whether the controller would listen there for this SE."""
        ...


def open_doors(connection: Attacked, own_number: int) -> list[Door]:
    """Returns what the gateway granted and must not, in the order of `Door`; empty where all is well.

    Args:
        connection: an authenticated link on which nothing else is asked for meanwhile.
        own_number: of this SE; the address of its neighbour is foreign.

    Raises:
        TunnelError: the link ended before all was answered.
    """
    foreign = se_address(own_number + 1 if own_number % 2 else own_number - 1)
    tries: dict[Door, Callable[[], bool]] = {
        Door.SESSION: connection.grants_session,
        Door.CONNECT: lambda: connection.grants_channel(*SELF_TEST_CHANNEL),
        Door.LISTEN: lambda: connection.grants_listen(foreign, REVERSE_PORT),
    }
    found: set[Door] = set()
    problems: list[Exception] = []

    def attempt(door: Door, granted: Callable[[], bool]) -> None:
        try:
            if granted():
                found.add(door)
        except Exception as error:  # noqa: BLE001 - raised again below, in the thread that asked
            problems.append(error)

    threads = [
        threading.Thread(target=attempt, args=pair, name=f"self-test {pair[0].value}", daemon=True)
        for pair in tries.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]
    if Door.SESSION in found:
        found |= {door for door, request, fields in _SESSION_REQUESTS if connection.grants_request(request, fields)}
        if connection.grants_x11():
            found.add(Door.X11)
    return [door for door in Door if door in found]
