"""09: certificates, host key, log-in key, root, passphrase, issuing CA and SE keys change under a hundred links, and
no heartbeat is lost."""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

from rig import running, until

from appliance.lab.fleet import Fleet

SES = 100
WORD, OTHER = "correct horse battery", "another horse battery"


def test_no_heartbeat_is_lost_while_everything_changes_under_a_hundred_links(tmp_path: Path) -> None:
    with running(tmp_path / "root", settings={"heartbeat_interval_s": 1.0}) as controller:
        operator = controller.operator

        def up() -> bool:
            return operator.status().states == {"UP": SES}

        def change_everything(fleet: Fleet) -> float:
            """Tells how long it took."""
            # What is lost before is forgotten when the measured time begins.
            until(lambda: fleet.is_measuring and up(), what="all are UP, and losses are counted", deadline_s=60)
            began = time.monotonic()
            controller.signal(signal.SIGHUP)
            assert operator.set_passphrase(WORD, reason="test").root_is_locked
            issuing = operator.controller().issuing_fingerprint
            for kind in ("login-key", "host-key", "ca"):
                operator.rotate(kind, "begin", passphrase=WORD)
                until(lambda kind=kind: not waiting(kind), what=f"all know the next {kind}", deadline_s=20)
                assert operator.rotate(kind, "finish", passphrase=WORD).phase == "none"
            operator.change_passphrase(WORD, OTHER, reason="test")
            assert operator.renew_issuing(OTHER, revoke=True, reason="test").issuing_fingerprint != issuing
            operator.revoke_image_key(operator.image_keys()[0].image_key_id, reason="test")
            keys = {summary.se_id: operator.se(summary.se_id).thumbprint for summary in operator.ses()[:10]}
            for se_id in keys:
                operator.rotate_se_key(se_id, reason="test")
            for se_id, before in keys.items():
                until(lambda se_id=se_id, before=before: operator.se(se_id).thumbprint != before, what="a new SE key")
            beats = {summary.se_id: operator.se(summary.se_id).last_heartbeat_at for summary in operator.ses()}
            for se_id, before in beats.items():
                until(
                    lambda se_id=se_id, before=before: operator.se(se_id).last_heartbeat_at > before, what="a heartbeat"
                )
            assert up()
            return time.monotonic() - began

        def waiting(kind: str) -> list[str]:
            return next(view.waiting for view in operator.rotations() if view.kind == kind)

        async def go() -> None:
            fleet = Fleet(controller.bundle, ses=SES, prefix="s", say=lambda _text: None)
            running_fleet = asyncio.create_task(fleet.run(0))
            try:
                took_s = await asyncio.to_thread(change_everything, fleet)
            finally:
                fleet.stop()
                report = await running_fleet
            assert (report.enrolled, report.linked) == (SES, SES)
            assert report.measured_s >= took_s, "all of it was measured"
            assert (report.lost_heartbeats, report.reconnects) == (0, 0)

        asyncio.run(go())
        assert operator.verify_audit().intact
