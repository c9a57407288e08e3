"""A real controller: events leave it, refusals don't fill its audit, and only true receipts count after a restore."""

from __future__ import annotations

import asyncio
import http.client
import http.server
import json
import os
import shutil
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rig import RunningController, machine, running, until, until_async

from appliance.controller import backup, restore
from appliance.errors import EnrollError
from appliance.lab.simulated import SimulatedSe
from appliance.pki import jws as signatures
from appliance.pki.authority import Authority
from appliance.pki.secret import Secret
from appliance.protocol import enroll as said
from appliance.protocol import jws, strict_json
from appliance.protocol.enroll import Pending
from appliance.protocol.trust import RECEIPT_TYPE, Envelope, Receipt
from appliance.runtime.clock import SystemClock

PASSPHRASE = Secret(b"correct horse battery staple")


class _Sink(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append(json.loads(body)["event"]["kind"])  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def sink() -> Iterator[Any]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Sink)
    server.got = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_events_reach_hook_and_webhook_and_a_hanging_hook_delays_no_heartbeat(tmp_path: Path, sink: Any) -> None:
    program = tmp_path / "hook"
    told = tmp_path / "events"
    program.write_text(f"#!/bin/sh\ncat >> {told}\nif grep -q se.state {told}; then sleep 15; fi\n")
    program.chmod(0o755)
    settings = {
        "events_hook": str(program), "events_webhook": f"http://127.0.0.1:{sink.server_port}/in",
        "heartbeat_interval_s": 0.3,
    }  # fmt: skip
    with running(tmp_path / "root", settings=settings) as controller:

        async def go() -> None:
            async with machine() as stand:
                se = stand.se(controller.bundle, "se-1")
                await se.enroll()
                await se.link()
                await se.beat()
                # It is there once the hook runs; from then on the hook hangs.
                await until_async(lambda: told.exists() and b"se.state" in told.read_bytes(), what="the hook ran")
                assert b"enroll.granted" in told.read_bytes()
                for _ in range(20):
                    began = time.monotonic()
                    await se.beat()
                    assert time.monotonic() - began < 7.5  # half of what the hook takes
                await until_async(lambda: "se.state" in sink.got, what="a change of state is posted")

        asyncio.run(go())
        assert sink.got.index("enroll.granted") < sink.got.index("se.state")
        began = time.monotonic()
        assert controller.stop() == 0
        assert time.monotonic() - began < 8.0, "a hook that hangs must not keep the controller from stopping"


def test_a_flood_of_refusals_leaves_no_trace_in_the_audit(tmp_path: Path) -> None:
    """Before a signature was verified anybody can ask: that is counted, and nothing is stored."""
    with running(tmp_path / "root") as controller:
        before = controller.operator.verify_audit().entries
        size = controller.paths.store_file.stat().st_size
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = http.client.HTTPSConnection("127.0.0.1", controller.enroll_port, context=context, timeout=20)
        count = 600
        for number in range(count):
            path = (said.ENROLL_PATH, said.REFRESH_PATH, said.REJOIN_PATH)[number % 3]
            connection.request("POST", path, body=b'{"payload":"%d"}' % number)
            answer = connection.getresponse()
            answer.read()
            assert answer.status in {400, 429}
        connection.close()
        assert sum(controller.operator.status().refusals.values()) == count
        assert controller.operator.verify_audit().entries == before
        assert controller.paths.store_file.stat().st_size == size


# ------------------------------------------------------------------------------------------------------ receipts


def set_back(controller: RunningController, file: Path) -> None:
    """Restores the backup in place of the running controller."""
    controller.kill()
    shutil.rmtree(controller.paths.controller_state)
    restore.restore(controller.paths, file, PASSPHRASE, clock=SystemClock(0.0, True))
    controller.start()


async def shown(se: SimulatedSe, receipt: Envelope | None) -> str:
    """What a refresh with that receipt is answered: a refusal's code, or 202."""
    if se.grant is not None and receipt is not None:
        se.grant = msgspec.structs.replace(se.grant, receipt=receipt)
    answer = await se.ask(said.REFRESH_PATH, se.signed_refresh)
    if answer.status == 202:
        answer.decode(Pending)
        return "202"
    try:
        answer.decode(Pending)
    except EnrollError as error:
        return error.code
    raise AssertionError(f"answered {answer.status}")


def test_only_a_true_receipt_of_ones_own_is_taken(tmp_path: Path) -> None:
    with running(tmp_path / "root") as controller:
        operator, file = controller.operator, tmp_path / "b"

        async def go() -> None:
            async with machine() as stand:
                known = stand.se(controller.bundle, "known")
                await known.enroll()
                backup.make(controller.paths, file, PASSPHRASE, now=int(time.time()))
                ses = [stand.se(controller.bundle, f"se-{number}") for number in range(3)]
                for se in ses:
                    await se.enroll()
                first, second, third = ses
                assert first.grant is not None
                assert second.grant is not None
                own, others = first.grant.receipt, second.grant.receipt
                await asyncio.to_thread(set_back, controller, file)

                receipt = msgspec.json.decode(own.body(), type=Receipt)
                forger = Authority.create(receipt.cluster_id, now=int(time.time()))
                forged = forger.sign(RECEIPT_TYPE, strict_json.encode(receipt))
                changed = msgspec.structs.replace(own, payload=forged.payload[:-4] + "fQ==")
                for bad in (others, forged, changed):
                    assert await shown(first, bad) == "ENROLL-037"
                assert operator.pending() == []

                # The true receipt and the true public key, which are no secrets, but somebody else's signature.
                first.grant = msgspec.structs.replace(first.grant, receipt=own)

                def forge(nonce: str) -> bytes:
                    payload = jws.decode_part(json.loads(first.signed_refresh(nonce))["payload"])
                    return signatures.sign(payload, [("se", first.identity.thumbprint, second.identity)])

                answer = await first.ask(said.REFRESH_PATH, forge)
                assert b"ENROLL-003" in answer.body
                assert operator.pending() == []
                assert await shown(first, own) == "202"
                assert await shown(first, own) == "202"
                (waiting,) = operator.pending()
                assert (waiting.number, waiting.name) == (receipt.number, "se-0")
                assert waiting.fingerprint == first.identity.thumbprint
                assert waiting.receipt_epoch == 1

                # A stranger with a key of its own and a receipt that it read somewhere.
                stranger = stand.se(controller.bundle, "stranger")
                stranger.grant, stranger.se_id = first.grant, first.se_id
                assert await shown(stranger, own) == "ENROLL-037"
                # One that the backup knows is answered as ever.
                await known.refresh()

                approved = operator.approve_receipts(reason="drill")
                assert [se.name for se in approved.approved] == ["se-0"]
                assert any("can't be known" in text for text in approved.warnings)
                grant = await first.refresh()
                assert grant.number == receipt.number
                renewed = msgspec.json.decode(grant.receipt.body(), type=Receipt)
                assert renewed.epoch == operator.controller().epoch > 1
                first.grant = grant
                await first.link()
                await first.beat()
                # A receipt of this epoch proves nothing that the controller doesn't know.
                operator.set_recovery("end", reason="")
                assert await shown(third, None) == "ENROLL-022"
                operator.set_recovery("begin", reason="")
                assert await shown(third, None) == "202"

        asyncio.run(go())
        assert operator.verify_audit().intact
        me = f"(uid {os.geteuid()}, process {os.getpid()})"
        mine = [entry.action for entry in operator.audit() if me in entry.actor]
        assert mine == ["se.approved", "recovery.ended", "recovery.begun"]
        until(lambda: operator.recovery().waiting == ["se-2"], what="the late one waits")
