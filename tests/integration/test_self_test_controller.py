"""The self-test of a link as the controller sees it: three refusals that are no attack, and everything else that is."""

from __future__ import annotations

import asyncio
import json
import re
import time
import urllib.request
from collections.abc import Iterator

import asyncssh
import pytest
from rig import RunningController, machine, running, until_async

from appliance.errors import EnrollError
from appliance.lab import simulated
from appliance.lab.simulated import SimulatedSe
from appliance.protocol import tunnel
from appliance.protocol.tunnel import Door, Heartbeat, Hello, HelloAnswer


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningController]:
    with running(tmp_path_factory.mktemp("selftest")) as found:
        yield found


async def foreign_listen(se: SimulatedSe) -> None:
    """Asks for another SE's address, and is refused."""
    assert se.conn is not None
    with pytest.raises(asyncssh.ChannelListenError):
        await se.conn.forward_remote_port("127.1.9.9", 5097, "127.0.0.1", 22)


def refused(controller: RunningController) -> dict[str, int]:
    """Counts of `appliance_refused_total` by reason."""
    url = f"http://127.0.0.1:{controller.bound['metrics_port']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    return {reason: int(count) for reason, count in _REFUSED.findall(text)}


_REFUSED = re.compile(r'^appliance_refused_total\{reason="([^"]+)"\} (\d+)$', re.MULTILINE)
COUNTED = {"gateway-session", "gateway-channel", "gateway-forward", "gateway-self-test"}


async def more(controller: RunningController, before: dict[str, int]) -> dict[str, int]:
    """What was counted since `before`, of what a link may be refused."""
    now = await asyncio.to_thread(refused, controller)
    return {
        reason: now[reason] - before.get(reason, 0)
        for reason in COUNTED & set(now)
        if now[reason] != before.get(reason, 0)
    }


def test_a_self_test_is_no_attack_and_hides_no_more_than_one_of_each_kind(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "honest")
            await se.enroll()
            before = await asyncio.to_thread(refused, controller)
            await se.link()
            assert se.open_doors == []
            assert await more(controller, before) == {"gateway-self-test": 3}
            await foreign_listen(se)
            assert await more(controller, before) == {"gateway-self-test": 3, "gateway-forward": 1}
            await se.beat()
            await until_async(lambda: controller.state("honest") == "UP OK", what="the SE is up")
            await foreign_listen(se)
            assert await more(controller, before) == {"gateway-self-test": 3, "gateway-forward": 2}
            assert controller.operator.se("honest").alarms == []

    asyncio.run(go())


def test_after_the_first_heartbeat_nothing_is_a_self_test(controller: RunningController) -> None:
    """A thief can't keep the three refusals for later."""

    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "later")
            await se.enroll()
            se.self_test = _nothing
            await se.link()
            await se.beat()
            before = await asyncio.to_thread(refused, controller)
            await foreign_listen(se)
            assert await more(controller, before) == {"gateway-forward": 1}

    asyncio.run(go())


async def _nothing() -> list[Door]:
    return []


def test_an_se_that_got_in_is_not_up_and_an_alarm_names_what_was_open(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "careless")
            await se.enroll()
            await se.link()
            se.open_doors = [Door.EXEC, Door.LISTEN]
            await se.beat()
            told = await until_async(
                lambda: controller.state("careless") == "DEGRADED UNCONFINED" and controller.operator.se("careless"),
                what="the controller tells it",
            )
            assert "exec, foreign listen address" in told.summary.text
            assert any("exec, foreign listen address" in text for text in told.alarms)
            chain = controller.operator.why("careless")
            assert chain.verdict.startswith("stopped at hello: ")
            assert "exec, foreign listen address" in chain.verdict
            events = [event.text for event in controller.operator.events() if event.kind == "se.unconfined"]
            assert len(events) == 1

    asyncio.run(go())


@pytest.mark.parametrize(("protocol", "who"), [(0, "agent"), (-5, "agent"), (4, "controller"), (99, "controller")])
def test_an_agent_of_another_protocol_is_refused_and_told_what_to_do(
    controller: RunningController, protocol: int, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, f"p{protocol}")
            await se.enroll()
            monkeypatch.setattr("appliance.protocol.tunnel.PROTOCOL_NUMBER", protocol)
            with pytest.raises(EnrollError, match=f"Protocol {protocol} is not spoken here") as refused:
                await se.link()
            assert refused.value.code == "TUNNEL-022"
            assert f"Upgrade the {who}" in refused.value.hint
            verdict = await until_async(
                lambda: "speaks protocol" in (text := controller.operator.why(se.name).verdict) and text,
                what="the controller says why",
            )
            assert f"speaks protocol {protocol}" in verdict

    asyncio.run(go())


# As protocol 1 had them: what an agent of that time reads must not have grown since.
_HELLO_1 = (
    b'{"protocol":1,"agent_version":"0.1.0","facts":{"boot_id":"b","instance_id":"i"},"ticket":"","trust_version":1,'
    b'"time":%d.0,"host_keys":[]}'
)
_HELLO_ANSWER_1 = {
    "protocol", "ticket", "quarantined", "reason", "heartbeat_interval_s", "time", "node", "reverse_address",
    "reverse_port", "trust", "audit_head", "receipt",
}  # fmt: skip
_HEARTBEAT_ANSWER_1 = {"sequence", "interval_s", "accepted", "trust", "audit_head", "rotate_key"}


def test_an_agent_of_protocol_1_links_and_is_told_nothing_that_it_does_not_know(controller: RunningController) -> None:
    async def say(se: SimulatedSe, path: str, body: bytes) -> dict[str, object]:
        assert se.conn is not None
        if se._channel is None:
            se._channel = await se.conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)
        reader, writer = se._channel
        answer = await simulated.exchange(reader, writer, path, body)
        assert answer.status == 200, answer
        found: dict[str, object] = json.loads(answer.body)
        return found

    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "old")
            await se.enroll()
            await se.connect()
            await se.open_reverse()
            greeted = await say(se, "/v1/hello", _HELLO_1 % time.time())
            assert greeted["protocol"] == 1
            assert set(greeted) <= _HELLO_ANSWER_1
            assert await say(se, "/v1/confirm", b'{"ticket":"%s"}' % str(greeted["ticket"]).encode()) == {"spent": True}
            for sequence in (1, 2):
                body = b'{"sequence":%d,"time":%d.0,"rtt_s":0.001}' % (sequence, time.time())
                assert set(await say(se, "/v1/heartbeat", body)) <= _HEARTBEAT_ANSWER_1
            await until_async(lambda: controller.state("old") == "UP OK", what="the old agent is up")

    asyncio.run(go())
    # What a new agent says to an old controller: hello as it was, and heartbeats without what came later.
    assert set(Hello.__struct_fields__) == {
        "protocol", "agent_version", "facts", "ticket", "trust_version", "time", "host_keys", "links", "audit_heads",
        "wants_receipt",
    }, "hello is read before a number is agreed on: what is new goes elsewhere"  # fmt: skip
    assert set(HelloAnswer.__struct_fields__) >= _HELLO_ANSWER_1
    assert set(Heartbeat.__struct_fields__) >= {"sequence", "time"}
