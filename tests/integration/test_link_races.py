"""Links of a real controller at moments that come too early, too late or all at once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncssh
import pytest
from rig import RunningController, machine, running, until_async

from appliance.errors import EnrollError
from appliance.protocol import tunnel
from appliance.protocol.operator import TokenWish


def test_who_is_revoked_between_log_in_and_hello_gets_no_link(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "late")
            await se.enroll()
            await se.connect()
            await se.open_reverse()
            await asyncio.to_thread(controller.operator.revoke_se, "late", reason="lost")
            # Its connection is closed, or its hello refused, whichever comes first.
            with pytest.raises((EnrollError, asyncssh.Error), match=r"not enrolled|closed|lost"):
                await se.hello()
            assert controller.state("late") == "REVOKED REVOKED"

    asyncio.run(go())


def test_who_logged_in_before_another_key_took_its_place_gets_no_link(controller: RunningController) -> None:
    """It holds an open connection, and said nothing yet, while the machine that replaces it rejoins."""

    async def go() -> None:
        async with machine() as stand:
            old, new = stand.se(controller.bundle, "replaced"), stand.se(controller.bundle, "replaced")
            await old.enroll()
            await old.connect()
            new.token = controller.operator.create_token(TokenWish(rejoin="replaced")).token
            await new.rejoin()
            with pytest.raises(EnrollError) as refused:
                await old.hello()
            assert refused.value.code == "TUNNEL-020"
            await new.link()
            await new.beat()

    asyncio.run(go())


def test_a_link_whose_hello_was_refused_does_not_stay(tmp_path: Path) -> None:
    async def go() -> None:
        with running(tmp_path / "root", settings={"login_timeout_s": 3.0}) as controller:
            async with machine() as stand:
                se = stand.se(controller.bundle, "refused")
                await se.enroll()
                conn = await se.connect()
                for body in (tunnel.Confirm(ticket="none"), tunnel.Heartbeat(sequence=1, time=0.0)):
                    with pytest.raises(EnrollError):
                        await se.say(tunnel.HELLO_PATH, body, tunnel.HelloAnswer)
                await asyncio.wait_for(conn.wait_closed(), 10)

    asyncio.run(go())


def test_channels_are_capped_when_they_all_come_at_once(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "burst")
            await se.enroll()
            await se.link()
            await se.beat()
            conn = se.conn
            assert conn is not None
            opened = await asyncio.gather(
                *(conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT) for _ in range(300)),
                return_exceptions=True,
            )
            refused = [one for one in opened if isinstance(one, asyncssh.ChannelOpenError)]
            granted = [one for one in opened if not isinstance(one, BaseException)]
            assert len(refused) + len(granted) == 300
            assert len(granted) == 63  # with the one that beats
            for _, writer in granted:
                writer.close()
            await until_async(lambda: controller.state("burst") == "UP OK", what="UP")
            await se.beat()

    asyncio.run(go())
