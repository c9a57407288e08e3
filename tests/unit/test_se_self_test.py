"""What the SE tries with its own key before it calls itself up."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from appliance.errors import TunnelError
from appliance.protocol.tunnel import Door
from appliance.se.self_test import open_doors


class Fake:
    """A gateway that grants what it is told to, and notes what it was asked."""

    def __init__(self, *doors: Door, ends: bool = False) -> None:
        self.doors = set(doors)
        self.ends = ends
        self.asked: set[object] = set()

    def _answer(self, asked: object, door: Door) -> bool:
        self.asked.add(asked)
        if self.ends:
            raise TunnelError("the link ended")
        return door in self.doors

    def grants_session(self) -> bool:
        return self._answer("session", Door.SESSION)

    def grants_channel(self, host: str, port: int) -> bool:
        return self._answer((host, port), Door.CONNECT)

    def grants_listen(self, address: str, port: int) -> bool:
        return self._answer((address, port), Door.LISTEN)

    def grants_request(self, request: str, fields: Sequence[str]) -> bool:
        names = {"shell": Door.SHELL, "exec": Door.EXEC, "auth-agent-req@openssh.com": Door.AGENT}
        return self._answer((request, *fields), Door.SFTP if request == "subsystem" else names[request])

    def grants_x11(self) -> bool:
        return self._answer("x11", Door.X11)


def test_what_refuses_all_is_asked_three_things() -> None:
    gateway = Fake()
    assert open_doors(gateway, 7) == []
    assert gateway.asked == {"session", ("127.0.0.1", 22), ("127.1.0.8", 5097)}


@pytest.mark.parametrize(("number", "neighbour"), [(1, "127.1.0.2"), (2, "127.1.0.1"), (256, "127.1.0.255")])
def test_the_address_wanted_is_never_the_own(number: int, neighbour: str) -> None:
    gateway = Fake()
    open_doors(gateway, number)
    assert (neighbour, 5097) in gateway.asked


def test_behind_a_granted_session_each_request_is_tried() -> None:
    gateway = Fake(*Door)
    assert open_doors(gateway, 1) == list(Door)
    assert {("exec", "true"), ("subsystem", "sftp"), "x11"} <= gateway.asked


def test_a_session_alone_is_too_much() -> None:
    assert open_doors(Fake(Door.SESSION), 1) == [Door.SESSION]


def test_a_link_that_ends_is_no_refusal() -> None:
    with pytest.raises(TunnelError, match="the link ended"):
        open_doors(Fake(ends=True), 1)
