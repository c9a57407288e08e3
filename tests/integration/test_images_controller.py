"""The ledger of images in a real controller: what operators ask for, and what it means for SEs and for thieves."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from image_reports import report
from rig import RunningController, machine, running, until_async

from appliance.controller import backup, restore
from appliance.errors import EnrollError, UsageError
from appliance.lab.simulated import SimulatedSe
from appliance.pki.secret import Secret
from appliance.protocol.enroll import Policy
from appliance.protocol.image import ImageReport
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.protocol.seed import Bundle
from appliance.runtime.clock import SystemClock

PASSPHRASE = Secret(b"correct horse battery staple")
SECOND = "seed-00000000000000b2"
STRANGE = "seed-ffffffffffffffff"


def of(controller: RunningController, bundle: Bundle, **changes: Any) -> ImageReport:
    """A report of an image of this cluster."""
    ids = {"cluster_id": controller.bundle.cluster_id, "image_key_id": bundle.image_key_id}
    return report(**{**ids, **changes})


def from_image(se: SimulatedSe, image_id: str) -> SimulatedSe:
    se.facts = msgspec.structs.replace(se.facts, image_digest=image_id)
    return se


def told(controller: RunningController, *args: str) -> Any:
    return json.loads(controller.command("image", *args, "--json").stdout)


def test_an_image_from_its_report_to_its_end(tmp_path: Path) -> None:
    """Added by the file that a builder wrote, named by SEs, revoked with its key, its SEs kicked; a thief stays out."""
    with running(tmp_path / "root") as controller:
        key = controller.operator.create_image_key(ImageKeyTermsWish()).bundle
        file = tmp_path / "edge.image.json"
        file.write_bytes(msgspec.json.encode(of(controller, key)))
        (view,) = told(controller, "add", str(file))
        assert (view["status"], view["ses"], view["files"]) == ("live", 0, [["edge.qcow2", "11" * 32]])
        assert told(controller, "add", str(file)) == [view], "twice is once"

        async def go() -> None:
            async with machine() as stand:
                ses = [from_image(stand.se(key, f"se-{name}"), view["image_id"]) for name in ("up", "off")]
                strange = from_image(stand.se(key, "se-strange"), STRANGE)
                other = stand.se(controller.bundle, "se-other")
                for se in (*ses, strange, other):
                    await se.enroll()
                for se in (ses[0], strange, other):
                    await se.link()
                    await se.beat()
                await until_async(lambda: controller.state("se-up") == "UP OK", what="UP")
                await asyncio.to_thread(the_middle)
                conn = ses[0].conn
                assert conn is not None
                revoked = await asyncio.to_thread(told, controller, "revoke", "edge", "--kick", "--reason", "leaked")
                assert [one["name"] for one in revoked["kicked"]] == ["se-up", "se-off"]
                assert all(one["error"] == "" for one in revoked["kicked"])
                assert revoked["revoked"]["key_revoked"]
                assert [one["name"] for one in revoked["revoked"]["by_key"]] == ["se-strange"]
                await asyncio.wait_for(conn.wait_closed(), 2)
                assert [controller.state(se.name) for se in ses] == ["REVOKED REVOKED"] * 2
                assert controller.operator.se("se-up").image == "edge, revoked"
                await strange.beat()
                await other.beat()
                for image_id, code in ((view["image_id"], "ENROLL-039"), (STRANGE, "ENROLL-007"), ("", "ENROLL-007")):
                    with pytest.raises(EnrollError) as refused:
                        await from_image(stand.se(key, "thief"), image_id).enroll()
                    assert refused.value.code == code
                await stand.se(controller.bundle, "se-late").enroll()
                again = await asyncio.to_thread(told, controller, "revoke", view["image_id"], "--kick")
                assert again["kicked"] == [], "who is out already isn't kicked again"

        def the_middle() -> None:
            listed = told(controller, "list")
            assert [(one["image_id"], one["ses"]) for one in listed["images"]] == [(view["image_id"], 2)]
            assert [(one["image_id"], one["status"], one["ses"]) for one in listed["unknown"]] == [
                (STRANGE, "unknown", 1)
            ]
            shown = told(controller, "show", "11" * 32)
            assert [se["name"] for se in shown["ses"]] == ["se-up", "se-off"]
            assert (shown["image"]["key_uses"], shown["image"]["key_max_uses"]) == (3, 500)
            assert told(controller, "show", STRANGE)["image"]["status"] == "unknown"
            assert controller.operator.se("se-up").image == "edge"
            assert controller.operator.se("se-strange").image == ""
            assert "not in the ledger" in controller.command("se", "show", "se-strange").stdout
            for args in (("list",), ("list", "--unknown"), ("show", "edge"), ("show", STRANGE), ("add", str(file))):
                assert "seed-" in controller.command("image", *args).stdout
            (own,) = (one for one in controller.operator.image_keys() if one.image_key_id == key.image_key_id)
            assert own.images == [view["image_id"]]

        asyncio.run(go())
        actions = [entry.action for entry in controller.operator.audit()]
        assert [actions.count(f"image{what}") for what in (".added", "-key.revoked", ".revoked")] == [1, 1, 1]
        kinds = [event.kind for event in controller.operator.events()]
        assert [kinds.count(f"image.{what}") for what in ("added", "revoked")] == [1, 1]
        assert controller.operator.verify_audit().intact


def test_a_shared_key_asks_before_it_goes(controller: RunningController) -> None:
    key = controller.operator.create_image_key(ImageKeyTermsWish()).bundle
    operator = controller.operator
    operator.add_image(of(controller, key, name="one"))
    operator.add_image(of(controller, key, name="two", image_id=SECOND))
    asked = controller.command("image", "revoke", "one", check=False)
    assert asked.returncode == 2
    assert "--keep-key leaves the door open" in asked.stderr
    assert f"two ({SECOND})" in asked.stderr
    assert operator.image("one").image.status == "live"
    assert controller.command("image", "revoke", "one", "--key", "--keep-key", check=False).returncode == 2
    kept = told(controller, "revoke", "one", "--keep-key")["revoked"]
    assert (kept["key_revoked"], [one["name"] for one in kept["others"]]) == (False, ["two"])
    assert operator.image("two").image.status == "live"
    named = operator.revoke_image_key(key.image_key_id, reason="all of them")
    assert [(one.name, one.status) for one in named.images] == [("one", "revoked"), ("two", "key revoked")]
    text = controller.command("image-key", "revoke", key.image_key_id).stdout
    assert f"it is in the image two ({SECOND})" in text


def test_who_waits_for_approval_is_rejected_by_a_kick(controller: RunningController) -> None:
    key = controller.operator.create_image_key(ImageKeyTermsWish(policy=Policy.APPROVE)).bundle
    image_id = "seed-00000000000000c3"
    controller.operator.add_image(of(controller, key, name="waits", image_id=image_id))

    async def go() -> None:
        async with machine() as stand:
            se = from_image(stand.se(key, "se-waits"), image_id)
            await se.ask("/v1/enroll", se.signed_enrollment)

    asyncio.run(go())
    assert controller.operator.se("se-waits").status == "pending"
    out = controller.command("image", "revoke", "waits", "--kick").stdout
    assert "se-waits" in out
    assert controller.operator.se("se-waits").status == "rejected"


def test_a_report_of_another_cluster_is_refused(controller: RunningController) -> None:
    with pytest.raises(UsageError, match="of the cluster"):
        controller.operator.add_image(of(controller, controller.bundle, cluster_id="another"))


@pytest.mark.slow
def test_a_backup_carries_the_ledger(tmp_path: Path) -> None:
    with running(tmp_path / "root") as controller:
        controller.operator.add_image(of(controller, controller.bundle))
        controller.operator.revoke_image("edge", key="keep", reason="old")
        before = controller.operator.images()
        backup.make(controller.paths, tmp_path / "b.backup", PASSPHRASE, now=int(time.time()))
        controller.stop()
        shutil.rmtree(controller.paths.controller_state)
        restore.restore(controller.paths, tmp_path / "b.backup", PASSPHRASE, clock=SystemClock(0.0, True))
        controller.start()
        assert controller.operator.images() == before
        assert before.images[0].status == "revoked"
