"""21: the kernel's own faults: an SE behind a router with real NAT, in network namespaces of their own.

    SE's namespace -- veth -- router's namespace, which masquerades -- veth -- root namespace with the controller

What elsewhere a cable in user space imitates, the router's connection tracking, its firewall and TCP itself do here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from lab_rig import INTERVAL_S, NOTICE_S, SLACK_S, RealSe, Site, site
from rig import until
from rough import judged
from traffic import ECHO, Traffic, echo_service, forwarded

from appliance.protocol.tunnel import DEADLINE_S
from appliance.protocol.why import Step

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="network namespaces need `ip` (iproute2)"),
    pytest.mark.skipif(shutil.which("nft") is None, reason="a router that does NAT needs `nft` (nftables)"),
]
BACK_S = 8.0
"""Until both sides call it UP: a redial, and two seconds in which the controller asks an older link."""
SE_ADDRESS, INSIDE_ADDRESS = "10.77.0.2", "10.77.0.1"
CLONE_NEWNET = 0x40000000
ESTABLISHED = ("state", "established")

ROUTER = """
table ip router {
    chain leaving { type nat hook postrouting priority srcnat; oifname "out" masquerade; }
    chain passing { type filter hook forward priority filter; ct state invalid drop; }
}
"""
FORGET = """
import socket, struct
with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12) as sock:  # NETLINK_NETFILTER
    # IPCTNL_MSG_CT_DELETE of all families and without a filter; NLM_F_REQUEST | NLM_F_ACK
    sock.send(struct.pack("=IHHIIBBH", 20, 1 << 8 | 2, 1 | 4, 1, 0, 0, 0, 0))
    error = struct.unpack_from("=i", sock.recv(4096), 16)[0]
raise SystemExit(-error)
"""
"""What `conntrack -F` does: empties the table of connections of its network namespace."""


def run(*words: str, said: str = "") -> str:
    """Runs a command, which must succeed, and returns what it printed."""
    done = subprocess.run(words, input=said, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


class Network:
    """The three namespaces. Whatever was made is removed by `close`."""

    def __init__(self) -> None:
        pid = os.getpid()
        self.se, self.router, self.device = f"se-{pid}", f"router-{pid}", f"nat{pid}"
        self._block = f"198.18.{128 + pid % 64}"
        self.controller, self.outside, self._next = (f"{self._block}.{host}" for host in (1, 2, 3))

    def make(self) -> None:
        """Plugs all of it together."""
        for namespace in (self.router, self.se):
            run("ip", "netns", "add", namespace)
            run("ip", "-n", namespace, "link", "set", "lo", "up")
        run("ip", "link", "add", self.device, "type", "veth", "peer", "name", "out", "netns", self.router)
        run("ip", "-n", self.router, "link", "add", "in", "type", "veth", "peer", "name", "eth0", "netns", self.se)
        run("ip", "addr", "add", f"{self.controller}/29", "dev", self.device)
        run("ip", "link", "set", self.device, "up")
        for namespace, device, address in (
            (self.router, "out", f"{self.outside}/29"),
            (self.router, "in", f"{INSIDE_ADDRESS}/24"),
            (self.se, "eth0", f"{SE_ADDRESS}/24"),
        ):
            run("ip", "-n", namespace, "addr", "add", address, "dev", device)
            run("ip", "-n", namespace, "link", "set", device, "up")
        run("ip", "-n", self.se, "route", "add", "default", "via", INSIDE_ADDRESS)
        self.set("ipv4/ip_forward", 1)
        self.nft(ROUTER)

    def close(self) -> None:
        """Removes all of it; each end of a pair takes the other along."""
        for words in (("link", "del", self.device), ("netns", "del", self.se), ("netns", "del", self.router)):
            subprocess.run(["ip", *words], check=False, capture_output=True, timeout=20)

    def inside(self, namespace: str) -> list[str]:
        """What comes before a command so that it runs in a namespace."""
        return ["ip", "netns", "exec", namespace]

    def nft(self, text: str) -> None:
        """Gives the router rules."""
        run(*self.inside(self.router), "nft", "-f", "-", said=text)

    def told(self) -> str:
        """The rules of what it does wrong, with their counters."""
        return run(*self.inside(self.router), "nft", "list", "table", "ip", "fault")

    def set(self, name: str, value: int, *, of: str = "") -> None:
        """Sets one of the kernel's settings, of the router unless another namespace is named."""
        run(*self.inside(of or self.router), "tee", f"/proc/sys/net/{name}", said=str(value))

    def fault(self, *chains: str) -> None:
        """The router does something wrong until it is mended: `chains` come before its own."""
        self.nft("\n".join(["table ip fault {", *chains, "}"]))

    def mend(self) -> None:
        """The router is all right again, and the cable is plugged."""
        self.nft("table ip fault {}\ndelete table ip fault")
        self.cable("up")

    def forget(self, *chains: str, picks_up: bool) -> None:
        """Empties the router's table of connections; it may pick up ones of which it sees the middle."""
        self.fault(*chains)
        self.set("netfilter/nf_conntrack_tcp_loose", int(picks_up))
        run(*self.inside(self.router), sys.executable, "-c", FORGET)

    def move(self) -> None:
        """The router gets another outside address and gives its old one back, as after a new dial-in."""
        self.set("netfilter/nf_conntrack_tcp_loose", 1)
        run("ip", "-n", self.router, "addr", "del", f"{self.outside}/29", "dev", "out")
        self.outside, self._next = self._next, self.outside
        run("ip", "-n", self.router, "addr", "add", f"{self.outside}/29", "dev", "out")

    def narrow(self, *mtu: str) -> None:
        """Only packets up to `mtu` ("lock" and bytes) leave the router for the controller; without it all do."""
        words = ("route", "change", f"{self._block}.0/29", "dev", "out", "src", self.outside)
        run("ip", "-n", self.router, *words, *(("mtu", *mtu) if mtu else ()))

    def cable(self, state: str) -> None:
        """Pulls (down) or plugs (up) the SE's cable, at the router's end."""
        run("ip", "-n", self.router, "link", "set", "in", state)

    def ports(self, port: int, *state: str) -> list[int]:
        """The SE's own ports of its TCP connections to the controller's `port`, of all or in one state ("state", …)."""
        lines = run(*self.inside(self.se), "ss", "-Htan", *state, "dst", f"{self.controller}:{port}")
        return [int(own) for own in re.findall(rf"{SE_ADDRESS}:(\d+)", lines)]

    def power_off(self, port: int) -> None:
        """The SE's kernel forgets its TCP connections to `port`, also those that it would still end."""
        self.set("ipv4/tcp_orphan_retries", 1, of=self.se)  # where a kernel can't do it for `ss`, soon by itself
        run(*self.inside(self.se), "ss", "-K", "dst", f"{self.controller}:{port}")
        until(lambda: not self.ports(port), what="its kernel knows nothing of the connection")


class InsideTraffic(Traffic):
    """A local program of an SE in a network namespace: a thread has one of its own."""

    def __init__(self, port: int, namespace: str) -> None:
        self._namespace = Path("/run/netns") / namespace
        super().__init__(port)

    def _run(self) -> None:
        with self._namespace.open() as file:
            assert ctypes.CDLL(None).setns(file.fileno(), CLONE_NEWNET) == 0
        super()._run()


class Place(NamedTuple):
    """A controller, and one SE behind the router, with traffic of a local program all the while."""

    at: Site
    se: RealSe
    network: Network
    traffic: Traffic


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Real cables and a router."""
    made = Network()
    try:
        made.make()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def place(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """It is UP."""
    with (
        echo_service() as echo,
        site(tmp_path_factory.mktemp("net"), address=network.controller, services={ECHO: f"127.0.0.1:{echo}"}) as found,
    ):
        # Longer than a kernel that looks for the MTU itself takes: it begins after 6.2 s of retransmissions.
        se = found.se("se-1", settings={"login_timeout_s": 10.0}, prefix=network.inside(network.se))
        port = forwarded(se)
        se.start()
        found.until_up(se)
        traffic = InsideTraffic(port, network.se)
        yield Place(found, se, network, traffic)
        traffic.close()


@pytest.fixture(autouse=True)
def mended(place: Place) -> Iterator[None]:
    """Leaves a good network to the next test."""
    yield
    place.network.mend()
    if place.se.process is None:
        place.se.start()
    place.at.until_up(place.se)


@contextlib.contextmanager
def struck(place: Place, **more: Any) -> Iterator[float]:
    """A fault happens and ends inside, judged as all are; nobody is taken for a copy. Yields when it began."""
    at, se, _, traffic = place
    with judged(at, se, traffic=traffic, back_s=BACK_S, **more) as since:
        yield since
    assert at.events("se.clone") == at.events("se.rolled-back") == []


def losses(se: RealSe, since: float) -> list[str]:
    """How links were lost since then, as the SE tells itself."""
    told = [json.loads(line) for line in se.logged().rpartition("\n")[0].splitlines()]  # the last may be half there
    recent = [entry["message"] for entry in told if datetime.fromisoformat(entry["time"]).timestamp() >= since]
    return [text.partition(" lost: ")[2] for text in recent if " lost: " in text]


SILENT = "the controller is silent: two pings unanswered"
HUNG_UP = "the link ended: the peer closed the connection"
RESET = "the link ended: Connection reset by peer"
UNHEARD = r"nothing heard for [\d.]+ s, and a ping went unanswered"
BROKEN = "the connection broke: "
CAME_BACK = "the SE came back from "
LAST_CALL_S = INTERVAL_S + DEADLINE_S + SLACK_S
"""Within which the controller asks a silent link."""

PASSING = "chain passing {{ type filter hook forward priority -5; {}; }}"
DROPS_STRANGE = "chain arriving { type filter hook input priority -5; ct state invalid,new drop; }"
"""What reaches the router's own address and belongs to no connection is dropped; else its kernel resets it."""
OTHER_PORTS = "chain leaving { type nat hook postrouting priority 99; meta l4proto tcp masquerade to :20000-29999; }"
PICKED_UP = PASSING.format("ct state new tcp flags & syn != syn counter")
SAYS_NOTHING = "chain saying { type filter hook output priority -5; icmp type destination-unreachable drop; }"


class Hole(NamedTuple):
    """What the router drops, and what is told of it."""

    rule: str
    se: str
    controller: str = UNHEARD
    state: str = "DOWN HEARTBEAT_MISSED"
    heard_s: float = 0.0
    """How long the SE may hear the controller meanwhile."""


HOLES = {
    "both ways": Hole("drop", SILENT),
    # The controller's last call is heard; that it hangs up waits behind what TCP sends again, and may never be.
    "towards the controller": Hole('oifname "out" drop', f"{SILENT}|{HUNG_UP}", heard_s=LAST_CALL_S),
    "towards the SE": Hole(
        'iifname "out" drop', SILENT, f"{UNHEARD}|{BROKEN}", state="DOWN (?:HEARTBEAT_MISSED|LINK_LOST)"
    ),
}


@pytest.mark.parametrize("name", HOLES)
def test_a_router_that_drops(place: Place, name: str) -> None:
    at, se, network, _ = place
    hole = HOLES[name]
    with struck(place, lost=hole.controller) as since:
        network.fault(PASSING.format(hole.rule))
        until(
            lambda: re.fullmatch(hole.state, at.controller.state("se-1")), what=f"the controller calls it {hole.state}",
            deadline_s=NOTICE_S + SLACK_S,
        )  # fmt: skip
        left_s = since + hole.heard_s + NOTICE_S + SLACK_S - time.time()
        until(lambda: losses(se, since) and se.state == "DOWN", what="the SE notices", deadline_s=left_s)
        assert re.match(f"stopped at link: (?:{hole.controller})", at.controller.operator.why("se-1").verdict)
        assert re.match(f"stopped at link: (?:{hole.se})", se.why().verdict)
        network.mend()


class Nat(NamedTuple):
    """What the router does to the connection with that port of the SE's, and what is told of it."""

    does: Callable[[Network, int], None]
    se: str
    controller: str
    noticed_s: float = SLACK_S
    """By the SE: at once where it is reset, since there is traffic."""


NATS = {
    "forgets and drops": Nat(
        lambda router, _: router.forget(DROPS_STRANGE, picks_up=False), SILENT, f"{UNHEARD}|{CAME_BACK}", NOTICE_S
    ),
    "forgets and resets": Nat(lambda router, _: router.forget(picks_up=False), SILENT, BROKEN, NOTICE_S),
    "gives another port": Nat(
        lambda router, _: router.forget(DROPS_STRANGE, OTHER_PORTS, picks_up=True), RESET, CAME_BACK
    ),
    "gets another address": Nat(lambda router, _: router.move(), RESET, CAME_BACK),
    "resets": Nat(
        lambda router, own: router.fault(
            PASSING.format(f"tcp sport {own} reject with tcp reset; tcp dport {own} reject with tcp reset")
        ),
        RESET, BROKEN,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NATS)
def test_a_router_that(place: Place, name: str) -> None:
    """The connection is lost in one moment, and the next one is let through."""
    at, se, network, _ = place
    nat = NATS[name]
    with struck(place, lost=nat.controller) as since:
        (own,) = network.ports(at.controller.ssh_port, *ESTABLISHED)
        nat.does(network, own)
        (told,) = until(lambda: losses(se, since), what="the SE notices", deadline_s=nat.noticed_s + SLACK_S)
        assert re.match(nat.se, told), told
        at.until_up(se, deadline_s=BACK_S)
        assert at.told_of_losses(se).startswith(f"from {network.outside}; ")
    assert len(losses(se, since)) == 1


def test_a_router_that_forgets_and_picks_up(place: Place) -> None:
    """It saw the middle of the connection and gave it the same port again: nobody notices."""
    at, se, network, _ = place
    with struck(place) as since:
        (own,) = network.ports(at.controller.ssh_port, *ESTABLISHED)
        network.forget(DROPS_STRANGE, PICKED_UP, picks_up=True)
        until(lambda: "counter packets 0 " not in network.told(), what="it picks the connection up")
    assert losses(se, since) == []
    assert network.ports(at.controller.ssh_port, *ESTABLISHED) == [own]


def test_a_router_that_loses_some_of_all(place: Place) -> None:
    """Each twentieth packet, either way, more than a bad radio link: TCP sends it again, and nobody notices."""
    at, se, network, traffic = place
    with struck(place) as since:
        network.fault(PASSING.format("numgen inc mod 20 0 counter drop"))
        until(
            lambda: int(re.findall(r"counter packets (\d+)", network.told())[0]) >= 20, what="twenty are lost",
            deadline_s=40.0,
        )  # fmt: skip
        traffic.flows()
        assert at.controller.state("se-1") == "UP OK"
        network.mend()
    assert losses(se, since) == []


@pytest.mark.parametrize("noticed", [True, False], ids=["noticed", "back before"])
def test_a_power_cut_leaves_half_a_connection(place: Place, noticed: bool) -> None:
    """No end and no reset gets out; the machine that is back knows nothing of the connection, and is no copy."""
    at, se, network, _ = place
    lost = UNHEARD if noticed else f"{BROKEN}|{CAME_BACK}"
    with struck(place, restarts=True, samples_apart_s=15.0, lost=lost):
        network.cable("down")
        se.kill()
        network.power_off(at.controller.ssh_port)
        if noticed:
            at.until_state(se, "DOWN HEARTBEAT_MISSED", deadline_s=NOTICE_S + SLACK_S)
            assert re.match(f"stopped at link: {UNHEARD}", at.controller.operator.why("se-1").verdict)
        else:
            assert at.controller.state("se-1") == "UP OK", "nobody noticed yet"
        network.cable("up")
        se.start()


@pytest.mark.slow
def test_a_way_that_drops_big_packets_and_says_nothing(place: Place) -> None:
    """Towards the controller an MTU is smaller, and no ICMP message tells: what is small gets across, as if all were
    well. No log-in does, and that is told; a kernel that looks for the MTU itself gets the SE in."""
    at, se, network, traffic = place
    with struck(place, lost=UNHEARD) as since:
        try:
            network.fault(SAYS_NOTHING)
            network.narrow("lock", "1280")
            at.until_state(se, "DOWN HEARTBEAT_MISSED", deadline_s=NOTICE_S + SLACK_S)
            until(lambda: losses(se, since), what="the SE notices", deadline_s=LAST_CALL_S + NOTICE_S)
            until(lambda: "no log-in within" in se.failed(Step.LINK), what="the SE says why it stays so")
            network.set("ipv4/tcp_mtu_probing", 1, of=network.se)
            at.until_up(se, deadline_s=20.0)
            traffic.flows()
        finally:
            network.set("ipv4/tcp_mtu_probing", 0, of=network.se)
            network.narrow()
