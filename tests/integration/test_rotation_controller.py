"""Changing root, host key and log-in key under live links, with power cuts in between and SEs that slept through it."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from rig import RunningController, linked, machine, running, until_async

from appliance.errors import TrustError, UnreachableError, UsageError
from appliance.protocol.trust import TrustDocument


def root_of(controller: RunningController) -> str:
    return controller.operator.controller().root_fingerprint


@pytest.mark.parametrize("kind", ["ca", "host-key", "login-key"])
def test_a_change_under_a_live_link(tmp_path: Path, kind: str) -> None:
    with running(tmp_path / "root", settings={"heartbeat_interval_s": 0.5}) as controller:
        operator = controller.operator

        async def go() -> None:
            async with machine() as stand:
                se = await linked(stand, controller, "awake")
                before = se.trust
                assert operator.rotate(kind, "begin").waiting == ["awake"]
                with pytest.raises(UsageError, match="under way already"):
                    operator.rotate(kind, "begin")
                with pytest.raises(UsageError, match="have not seen the successor"):
                    operator.rotate(kind, "finish")
                await se.beat()
                await se.beat()
                announced = se.trust
                assert listed(before, kind) < listed(announced, kind)
                assert next(view for view in operator.rotations() if view.kind == kind).waiting == []
                # A power cut before the end changes nothing.
                controller.kill()
                controller.start()
                se.close()
                await se.link()
                await se.beat()
                done = operator.rotate(kind, "finish")
                assert done.phase == "none"
                await se.beat()
                final = se.trust
                assert listed(final, kind) == listed(announced, kind) - listed(before, kind)
                # The link lived through it, and a new one comes up with what the SE believes now.
                await se.refresh()
                se.close()
                await se.link()
                await se.beat()
                await until_async(lambda: controller.state("awake") == "UP OK", what="UP")

        asyncio.run(go())
        assert operator.verify_audit().intact
        actions = [entry.action for entry in operator.audit()]
        assert f"trust.{kind}.begin" in actions
        assert f"trust.{kind}.finish" in actions


def listed(document: TrustDocument, kind: str) -> set[str]:
    if kind == "ca":
        return set(document.roots)
    if kind == "login-key":
        return set(document.login_keys)
    return set(document.nodes[0].host_keys)


def test_an_se_that_slept_through_a_change_of_root_follows_and_old_images_still_enroll(tmp_path: Path) -> None:
    with running(tmp_path / "root") as controller:
        operator = controller.operator
        old_bundle = controller.bundle
        old_root = root_of(controller)

        async def go() -> None:
            async with machine() as stand:
                se = await linked(stand, controller, "asleep")
                se.close()
                operator.rotate("ca", "begin")
                operator.rotate("ca", "finish", force=True)
                assert root_of(controller) != old_root
                # It trusts the old root alone: TLS by the cross-certificate, the trust document by both signatures.
                await se.refresh()
                newest = se.trust
                assert len(newest.roots) == 1
                assert hashlib.sha256(ssl.PEM_cert_to_DER_cert(newest.roots[0])).hexdigest() == root_of(controller)
                await se.link()
                late = stand.se(old_bundle, "old-image")
                await late.enroll()
                await late.link()
                # Once the former root is forgotten, documents are no longer signed for who knows only that one.
                assert operator.rotate("ca", "forget").former_kept is False
                operator.rotate("login-key", "begin")
                with pytest.raises(TrustError, match="isn't signed by a root"):
                    await stand.se(old_bundle, "too-late").enroll()

        asyncio.run(go())


def test_an_aborted_change_leaves_the_old_one_alone(tmp_path: Path) -> None:
    with running(tmp_path / "root") as controller:
        before = root_of(controller)
        for kind in ("ca", "host-key", "login-key"):
            controller.operator.rotate(kind, "begin")
            assert controller.operator.rotate(kind, "abort").phase == "none"
            with pytest.raises(UsageError, match="no change"):
                controller.operator.rotate(kind, "finish", force=True)
        assert root_of(controller) == before
        assert not list(controller.paths.controller_state.glob("next-*"))

        async def go() -> None:
            async with machine() as stand:
                await linked(stand, controller, "as-before")

        asyncio.run(go())


CUT = """
import os, sys, time
from pathlib import Path
from appliance.controller import rotation
from appliance.controller.material import Files, Material
from appliance.controller.trust import Publication
from appliance.storage import atomic

root, kind, verb, cut = Path(sys.argv[1]), rotation.Kind(sys.argv[2]), sys.argv[3], int(sys.argv[4])
files = Files(root / "var/lib/appliance/controller")
rotation.resume_files(files)
material = Material(files)
publication = Publication(material, on_publish=lambda _: None, wall=time.time)
change = rotation.Rotation(material, publication, waiting=lambda _: [], on_switch=lambda _: None, wall=time.time)
left = cut
real = os.replace, os.rename

def counting(which):
    def step(*args, **more):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return which(*args, **more)
    return step

os.replace, os.rename = map(counting, real)
unlink = os.unlink
os.unlink = counting(unlink)
change.resume()
getattr(change, verb)(kind)
"""


@pytest.mark.parametrize(
    "kind",
    ["ca", pytest.param("host-key", marks=pytest.mark.slow), pytest.param("login-key", marks=pytest.mark.slow)],
)
def test_a_power_cut_at_any_step_is_finished_by_the_next_start(tmp_path: Path, kind: str) -> None:
    """Each rename and unlink is a step; after each cut the daemon starts, and the change can be brought to its end."""
    controller = RunningController(tmp_path / "root")
    for verb in ("begin", "finish"):
        before = tmp_path / f"before-{verb}"
        shutil.copytree(controller.paths.state, before)
        for cut in range(40):
            shutil.rmtree(controller.paths.state)
            shutil.copytree(before, controller.paths.state)
            ended = step(controller, kind, verb, cut)
            try:
                controller.start()
                phases = {view.kind: view.phase for view in controller.operator.rotations()}
                assert phases[kind] in {"none", "announced"}
                if phases[kind] == "announced":
                    controller.operator.rotate(kind, "finish", force=True)

                async def comes_up(controller: RunningController = controller) -> None:
                    async with machine() as stand:
                        await linked(stand, controller, "after-the-cut")

                asyncio.run(comes_up())
            finally:
                controller.end()
            if ended == 0:
                break
            assert ended == 9
        else:
            pytest.fail("the change never came to its end")
        shutil.rmtree(controller.paths.state)
        shutil.copytree(before, controller.paths.state)
        assert step(controller, kind, verb, 999) == 0


def step(controller: RunningController, kind: str, verb: str, cut: int) -> int:
    line = [sys.executable, "-c", CUT, str(controller.root), kind, verb, str(cut)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode in {0, 9}, done.stderr
    return done.returncode


def test_a_link_with_the_old_host_key_alone_is_refused_after_the_switch(tmp_path: Path) -> None:
    with running(tmp_path / "root") as controller:

        async def go() -> None:
            async with machine() as stand:
                se = await linked(stand, controller, "old-host-key")
                controller.operator.rotate("host-key", "begin")
                controller.operator.rotate("host-key", "finish", force=True)
                se.close()
                with pytest.raises(UnreachableError, match="Host key"):
                    await se.link()
                await se.refresh()
                await se.link()

        asyncio.run(go())
