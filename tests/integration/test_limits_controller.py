"""What one key, one link or one stop may cost others: limits of a real controller, from both sides."""

from __future__ import annotations

import asyncio
import http.client
import time
from pathlib import Path

import msgspec
import pytest
from rig import RunningController, machine, running, until_async

from appliance.controller.channel import RESTS_S
from appliance.errors import EnrollError
from appliance.lab.simulated import SimulatedSe
from appliance.pki import tls
from appliance.protocol import enroll, strict_json, tunnel
from appliance.protocol.enroll import NonceAnswer
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.protocol.problem import Problem
from appliance.protocol.trust import TRUST_PATH
from appliance.protocol.tunnel import Heartbeat


def ask(
    controller: RunningController, path: str, body: bytes = b"", *, source: str = "127.0.0.1"
) -> tuple[int, dict[str, str], bytes]:
    """One request to the enroll port. Returns status, headers and body of the answer."""
    context = tls.client_context([controller.bundle.root_ca])
    connection = http.client.HTTPSConnection(
        "127.0.0.1", controller.enroll_port, timeout=20, context=context, source_address=(source, 0)
    )
    try:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def enrolled(controller: RunningController, se: SimulatedSe) -> tuple[int, dict[str, str], Problem | None]:
    """One try to enroll, as far as its answer goes."""
    nonce = strict_json.decode(ask(controller, enroll.NONCE_PATH)[2], NonceAnswer, max_bytes=1000).nonce
    status, headers, body = ask(controller, enroll.ENROLL_PATH, se.signed_enrollment(nonce))
    return status, headers, None if status < 300 else msgspec.json.decode(body, type=Problem)


def test_a_link_that_beats_too_often_is_told_to_wait_and_stays(
    controller: RunningController,
) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "eager")
            await se.enroll()
            await se.link()
            await se.beat()
            conn = se.conn
            assert conn is not None
            reader, writer = await conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT)
            statuses, waits = [], set()
            began = time.monotonic()
            for sequence in range(120):
                body = strict_json.encode(Heartbeat(sequence=sequence, time=time.time()))
                host = (tunnel.CHANNEL_HOST, "other")[sequence % 2]  # as an agent says it, and not
                head = f"POST {tunnel.HEARTBEAT_PATH} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
                writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                lines = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode().lower().split("\r\n")
                headers = dict(line.split(": ", 1) for line in lines[1:] if line)
                said = await reader.readexactly(int(headers["content-length"]))
                statuses.append(int(lines[0].split(" ")[1]))
                if statuses[-1] == 429:
                    assert msgspec.json.decode(said, type=Problem).code == "TUNNEL-045"
                    waits.add(headers["retry-after"])
            assert statuses[:20] == [200] * 20, "a burst is answered"
            assert statuses.count(429) > 40
            # The rest after the last one is nobody's wait any more.
            assert time.monotonic() - began > (statuses.count(429) - 1) * RESTS_S
            assert waits <= {"1", "2"}
            await until_async(lambda: controller.state("eager") == "UP OK", what="it stays UP")
            assert se.conn is conn
            writer.close()

    asyncio.run(go())


def test_a_drained_controller_says_so_at_its_enroll_port(tmp_path: Path) -> None:
    with running(tmp_path / "root") as controller:

        async def go() -> None:
            async with machine() as stand:
                se = stand.se(controller.bundle, "early")
                await se.enroll()
                await se.link()
                await se.beat()
                await until_async(lambda: controller.state("early") == "UP OK", what="UP")
                assert (await asyncio.to_thread(controller.operator.drain)).links == 1
                # With a body that none of them takes: it isn't looked at.
                paths = enroll.NONCE_PATH, enroll.ENROLL_PATH, enroll.REFRESH_PATH, enroll.REJOIN_PATH, TRUST_PATH
                for path in paths:
                    status, headers, body = await asyncio.to_thread(ask, controller, path, b"\xff")
                    assert (status, headers["retry-after"]) == (503, "10")
                    assert msgspec.json.decode(body, type=Problem).code == "ENROLL-038"
                with pytest.raises(EnrollError):
                    await stand.se(controller.bundle, "late").enroll()
                await se.beat()
                assert controller.state("early") == "UP OK", "links that are open stay"
                assert controller.operator.status().refusals["ENROLL-038"] >= len(paths)

        asyncio.run(go())


RATES = {"enroll_rate_per_s": 0.001, "source_rate_per_s": 0.001, "enroll_burst": 8, "source_burst": 5}


def test_a_source_spends_its_share_and_all_of_them_no_more_than_the_whole(tmp_path: Path) -> None:
    """Before anything of a request is read: the first source has five, the second what the first left of eight."""
    with running(tmp_path / "root", settings=RATES) as controller:
        paths = (enroll.NONCE_PATH, enroll.ENROLL_PATH, TRUST_PATH, enroll.REFRESH_PATH, enroll.REJOIN_PATH)
        for source, allowed in (("127.0.0.2", 5), ("127.0.0.3", 3), ("127.0.0.4", 0)):
            for _ in range(allowed):
                assert ask(controller, enroll.NONCE_PATH, source=source)[0] == 200
            for path in paths:
                status, headers, body = ask(controller, path, b"{", source=source)
                assert (status, headers["retry-after"]) == (429, "2")
                assert msgspec.json.decode(body, type=Problem).code == "ENROLL-019"
        assert controller.operator.status().refusals["ENROLL-019"] == 3 * len(paths)
        assert "ENROLL-019" in controller.operator.why("127.0.0.4").verdict


def test_a_stolen_key_floods_and_others_go_on_enrolling(tmp_path: Path) -> None:
    """The thief spends its own key's share; SEs of another key, from the same address, get in meanwhile."""
    with running(tmp_path / "root") as controller:
        wish = ImageKeyTermsWish(rate_per_s=1.0, burst=3, max_uses=1000, note="stolen")
        stolen = controller.operator.create_image_key(wish).bundle

        async def go() -> None:
            async with machine() as stand:
                outcomes: list[tuple[int, str, int]] = []

                async def flood(index: int) -> None:
                    while not done.is_set():
                        thief = stand.se(stolen, f"thief-{index}")
                        status, headers, problem = await asyncio.to_thread(enrolled, controller, thief)
                        outcomes.append((status, problem.code if problem else "", int(headers.get("retry-after", 0))))

                done = asyncio.Event()
                floods = [asyncio.create_task(flood(index)) for index in range(3)]
                await until_async(lambda: any(one[0] == 429 for one in outcomes), what="the key's share is spent")
                began = time.monotonic()
                honest = [stand.se(controller.bundle, f"honest-{index}") for index in range(20)]
                await asyncio.gather(*(se.enroll() for se in honest))
                took_s = time.monotonic() - began
                done.set()
                await asyncio.gather(*floods)
                refused = [one for one in outcomes if one[0] != 201]
                assert refused
                assert {one[1:] for one in refused} == {("ENROLL-040", 1)}
                assert len(outcomes) - len(refused) <= 3 + (time.monotonic() - began + 10), "its rate holds"
                assert took_s < 10
                view = {key.image_key_id: key for key in controller.operator.image_keys()}
                assert view[stolen.image_key_id].limited == len(refused)
                assert (view[stolen.image_key_id].rate_per_s, view[stolen.image_key_id].burst) == (1.0, 3)
                assert view[controller.bundle.image_key_id].limited == 0
                assert controller.operator.status().refusals["ENROLL-040"] == len(refused)

        asyncio.run(go())


def test_a_flood_by_a_key_is_audited_as_a_count(tmp_path: Path) -> None:
    # Looks after requests for approval are a tenth of their life apart, and this goes with them.
    with running(tmp_path / "root", settings={"pending_life_s": 2.0}) as controller:
        limited = controller.operator.create_image_key(ImageKeyTermsWish(rate_per_s=0.001, burst=1)).bundle

        async def go() -> None:
            async with machine() as stand:
                for index in range(6):
                    await asyncio.to_thread(enrolled, controller, stand.se(limited, f"se-{index}"))

        asyncio.run(go())

        def entries() -> list[str]:
            told = [one for one in controller.operator.audit() if one.action == "enroll.limited"]
            return [one.detail for one in told if one.subject == limited.image_key_id]

        asyncio.run(until_async(entries, what="an entry"))
        assert len(entries()) == 1
        assert entries()[0].endswith("refused: more than its rate allows")
        assert [one.subject for one in controller.operator.events() if one.kind == "enroll.limited"] == [
            limited.image_key_id
        ]


@pytest.mark.slow
def test_a_thousand_vms_behind_one_address_get_in(tmp_path: Path) -> None:
    """All at once, from one address, by one image key, each of them waiting as it is told."""
    with running(tmp_path / "root") as controller:
        bundle = controller.operator.create_image_key(ImageKeyTermsWish(max_uses=1000)).bundle

        async def go() -> None:
            async with machine() as stand:
                open_at_once = asyncio.Semaphore(200)  # files of this one process

                async def one(index: int) -> None:
                    se = stand.se(bundle, f"vm-{index}")
                    while True:
                        try:
                            async with open_at_once:
                                await se.enroll()
                        except EnrollError as error:
                            if error.code not in {"ENROLL-019", "ENROLL-040"}:
                                raise
                            await asyncio.sleep(1.0)
                        else:
                            return

                began = time.monotonic()
                await asyncio.gather(*(one(index) for index in range(1000)))
                took_s = time.monotonic() - began
                status = controller.operator.status()
                assert status.enrolled == 1000
                assert took_s < 90, f"{took_s:.1f} s, refusals {status.refusals}"

        asyncio.run(go())
