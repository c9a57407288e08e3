"""Changing root, host key and log-in key under live links, with power cuts in between and SEs that slept through it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import msgspec
import pytest
from rig import RunningController, linked, machine, running, until, until_async

from appliance.controller import material, rotation
from appliance.controller.material import Files, Material
from appliance.controller.rotation import Kind, Rotation, make_root, resume_files
from appliance.controller.trust import Publication
from appliance.errors import (
    PassphraseError,
    TooSoonError,
    TrustError,
    UnreachableError,
    UsageError,
    WrongPassphraseError,
)
from appliance.pki import sealed, tls
from appliance.pki.authority import Authority
from appliance.pki.certificate import all_of
from appliance.pki.secret import Secret
from appliance.pki.trust import verify_trust
from appliance.protocol import strict_json
from appliance.protocol.trust import (
    MAX_TRUST_BYTES,
    TRUST_PATH,
    Envelope,
    TrustAnswer,
    TrustDocument,
    TrustRequest,
)
from appliance.runtime.clock import SystemClock
from appliance.runtime.stop import StopToken
from appliance.se.https import JSON, MAX_ANSWER_BYTES, Conversation


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
                # Once the former root is forgotten, documents are no longer signed for who knows only that one: an
                # agent that doesn't ask for what it missed is refused, and one that asks is not.
                assert operator.rotate("ca", "forget").former_kept is False
                operator.rotate("login-key", "begin")
                late = stand.se(old_bundle, "late")
                with pytest.raises(TrustError, match="isn't signed by a root"):
                    await late.enroll()
                late.trust = caught_up(controller, document_of(old_bundle.trust))
                await late.refresh()
                await late.link()

        asyncio.run(go())


def document_of(envelope: Envelope) -> TrustDocument:
    return strict_json.decode(envelope.body(), TrustDocument, max_bytes=MAX_TRUST_BYTES)


def caught_up(controller: RunningController, document: TrustDocument, *, steps: int | None = None) -> TrustDocument:
    """What an SE with `document` believes once it asked for what it missed; each step is verified as an SE does."""
    taken = 0
    while True:
        with Conversation(
            f"127.0.0.1:{controller.enroll_port}", trust=document, clock=SystemClock(), connect_timeout_s=5.0,
            stop=StopToken(),
        ) as there:  # fmt: skip
            wish = strict_json.encode(TrustRequest(version=document.version))
            answer = there.post(TRUST_PATH, wish, attempt_id="0" * 16, media_type=JSON)
        assert answer.status == 200, answer
        given = strict_json.decode(answer.body, TrustAnswer, max_bytes=MAX_ANSWER_BYTES)
        following = verify_trust(given.trust, anchors=document.roots, current=document)
        if following.version <= document.version:
            assert steps in {None, taken}
            return document
        document, taken = following, taken + 1


def change_root(controller: RunningController) -> None:
    controller.operator.rotate("ca", "begin")
    controller.operator.rotate("ca", "finish", force=True)


def test_any_number_of_changes_of_root_is_followed_one_by_one(tmp_path: Path) -> None:
    """By the documents that ended the changes, each signed by the root before it; over HTTPS, or over a link that is
    there, since the host key is the same. No root's key is kept for it."""
    with running(tmp_path / "root") as controller:
        operator, state = controller.operator, controller.paths.controller_state
        first = document_of(controller.bundle.trust)

        async def go() -> None:
            async with machine() as stand:
                se = await linked(stand, controller, "asleep")
                se.close()
                for _ in range(3):
                    change_root(controller)
                operator.rotate("ca", "forget")
                operator.rotate("login-key", "begin")
                # A power cut takes none of it away.
                controller.kill()
                controller.start()
                assert sorted(path.name for path in state.glob("*root-ca.key")) == ["root-ca.key"]
                newest = caught_up(controller, first, steps=4)
                assert newest.version == operator.controller().trust_version
                assert len(newest.login_keys) == 2
                # From the middle of it, and from the end.
                caught_up(controller, newest, steps=0)
                # The same on a link: what comes with hello and heartbeats can be verified at each step.
                hello = await se.link()
                se.follow(hello.trust)
                seen = [se.trust.version]
                while se.trust.version < newest.version:
                    await se.beat()
                    seen.append(se.trust.version)
                assert len(seen) == 4
                assert se.trust == newest
                await se.refresh()

        asyncio.run(go())


def test_the_oldest_of_many_changes_of_root_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "MAX_ROOT_CHANGES", 2)
    files = Files(tmp_path)
    material.create(files, cluster_id="c-1", addresses=["a"], enroll_port=1, ssh_port=2, now=int(time.time()))
    now, change = started(tmp_path, "")
    for _ in range(4):
        change.begin(Kind.CA)
        change.finish(Kind.CA)
    again, _ = started(tmp_path, "")
    assert [entry.version for entry in now.successions] == [entry.version for entry in again.successions] == [7, 9]
    assert len(list(tmp_path.glob("trust-*.json"))) == 2
    assert len(all_of(files.cross_certificate.read_bytes())) == 2
    publication = Publication(again, on_publish=lambda _: None, wall=time.time)
    followed = [document_of(publication.following(version)).version for version in (1, 6, 7, 8, 9)]
    assert followed == [7, 7, 9, 9, 9]


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


CUTTER = """
import asyncio, contextlib, json, os, shutil, sys, time
from pathlib import Path
from appliance.controller import rotation
from appliance.controller.material import Files, Material
from appliance.controller.trust import Publication
from appliance.controller.vault import Vault
from appliance.pki import sealed
from appliance.pki.secret import Secret

origin, folder, kind, verb, word, other = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
sealed.SCRYPT_LOG2_N = 4
secret = Secret(word.encode()) if word else None

def prepared(state):
    files = Files(state)
    rotation.resume_files(files)
    material = Material(files)
    publication = Publication(material, on_publish=lambda _: None, wall=time.time)
    if kind == "passphrase":
        vault = Vault(material, publication, on_switch=lambda: None, wall=time.time, monotonic=time.monotonic)
        acts = {
            "set": lambda: vault.set(secret),
            "change": lambda: vault.change(secret, Secret(other.encode())),
            "remove": lambda: vault.remove(secret),
            "renew": lambda: vault.renew_issuing(secret, revoke=True),
        }
        return lambda: asyncio.run(acts[verb]())
    change = rotation.Rotation(material, publication, waiting=lambda _: [], on_switch=lambda _: None, wall=time.time)
    change.resume()
    made = []
    if (kind, verb) == ("ca", "begin"):
        made = [rotation.make_root(material.cluster.cluster_id, now=int(time.time()), passphrase=secret)]
    opened = material.unlock(secret) if secret else None

    def act():
        with material.unlocked(opened) if opened else contextlib.nullcontext():
            getattr(change, verb)(rotation.Kind(kind), *made)

    return act

def run_cut(state, number):
    pid = os.fork()
    if pid == 0:
        try:
            act, calls = prepared(state), 0
            def counting(which):
                def step(*args, **more):
                    nonlocal calls
                    calls += 1
                    if calls > number:
                        os._exit(9)
                    return which(*args, **more)
                return step
            for name in ("replace", "rename", "unlink"):
                setattr(os, name, counting(getattr(os, name)))
            act()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for number in range(100):
    state = folder / str(number)
    shutil.copytree(origin, state)
    code = run_cut(state, number)
    if code == 0:
        break
    assert code == 9, code
print(json.dumps(number))
"""
"""Carries a change out on copies of a state, cut before the first rename or unlink, before the second, and so on."""

WORD, OTHER = "correct horse battery", "another horse battery"


def cut_everywhere(origin: Path, folder: Path, kind: str, verb: str, word: str) -> list[Path]:
    """Returns the states, in the order of the cuts; the last one wasn't cut."""
    folder.mkdir()
    line = [sys.executable, "-c", CUTTER, str(origin), str(folder), kind, verb, word, OTHER]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [folder / str(number) for number in range(json.loads(done.stdout) + 1)]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passphrases are tried often, in this process and in the cutter alone."""
    monkeypatch.setattr(sealed, "SCRYPT_LOG2_N", 4)


def started(state: Path, word: str) -> tuple[Material, Rotation]:
    """What the daemon does with a state before it serves anybody; nobody tells it a passphrase."""
    files = Files(state)
    resume_files(files)
    material = Material(files)
    publication = Publication(material, on_publish=lambda _: None, wall=time.time)
    change = Rotation(material, publication, waiting=lambda _: [], on_switch=lambda _: None, wall=time.time)
    if material.renewal_due(time.time()):
        material.renew_node_certificate(int(time.time()))
    tls.server_context(files.node_certificate, files.node_key)
    change.resume()
    assert material.authority.is_locked is (material.issuing is not None) is files.issuing_key.exists() is bool(word)
    left = {path.name for path in state.iterdir()}
    assert not [name for name in left if name.startswith(("staged-", "gone-", "switching"))]
    return material, change


def opened(material: Material, secret: Secret | None) -> contextlib.AbstractContextManager[None]:
    return material.unlocked(material.unlock(secret)) if secret else contextlib.nullcontext()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("kind", "word"),
    [
        pytest.param("ca", WORD, id="ca-locked"),
        pytest.param("host-key", "", id="host-key-open"),
        *(
            pytest.param(kind, word, id=f"{kind}-{'locked' if word else 'open'}", marks=pytest.mark.slow)
            for kind, word in (("ca", ""), ("host-key", WORD), ("login-key", ""), ("login-key", WORD))
        ),
    ],
)
def test_a_power_cut_at_any_step_is_finished_or_taken_back_by_the_next_start(
    tmp_path: Path, kind: str, word: str
) -> None:
    """Each rename and unlink is a step; after each cut the change can be brought to its end."""
    state = RunningController(tmp_path / "root", passphrase=word).paths.controller_state
    steps, secret = 0, Secret(word.encode()) if word else None
    for verb in ("begin", "abort", "finish"):
        cuts = cut_everywhere(state, tmp_path / verb, kind, verb, word)
        if verb == "begin":
            state = shutil.copytree(cuts[-1], tmp_path / "announced")
        for number, cut in enumerate(cuts):
            material, change = started(cut, word)
            phase = change.view(Kind(kind)).phase
            is_last = number == len(cuts) - 1
            assert phase in ({"announced" if verb == "begin" else "none"} if is_last else {"none", "announced"})
            if phase == "none":
                root = make_root(material.cluster.cluster_id, now=int(time.time()), passphrase=secret)
                with opened(material, secret):
                    change.begin(Kind(kind), root if kind == "ca" else None)
            with opened(material, secret):
                change.finish(Kind(kind))
            material, change = started(cut, word)
            assert change.view(Kind(kind)).phase == "none"
            assert not [path.name for path in cut.iterdir() if path.name.startswith("next-")]
        steps += len(cuts)
    assert steps > 15


@pytest.mark.parametrize("kind", ["ca", pytest.param("host-key", marks=pytest.mark.slow)])
def test_a_controller_that_was_cut_in_a_change_serves_again(tmp_path: Path, kind: str) -> None:
    """The daemon itself, where some of the cuts left it."""
    controller = RunningController(tmp_path / "root")
    state, announced = controller.paths.controller_state, tmp_path / "announced"
    shutil.copytree(cut_everywhere(state, tmp_path / "begin", kind, "begin", "")[-1], announced)
    cuts = cut_everywhere(announced, tmp_path / "finish", kind, "finish", "")
    for cut in cuts[1 :: max(1, len(cuts) // 3)]:
        shutil.rmtree(state)
        shutil.copytree(cut, state)
        try:
            controller.start()
            view = next(view for view in controller.operator.rotations() if view.kind == kind)
            if view.phase == "announced":
                controller.operator.rotate(kind, "finish", force=True)

            async def comes_up() -> None:
                async with machine() as stand:
                    await linked(stand, controller, "after-the-cut")

            asyncio.run(comes_up())
        finally:
            controller.end()


CUT_BEFORE_THE_ENTRY = """
import os, sys
from appliance.cli import root
from appliance.controller.registry import Registry

commit = Registry.commit_noted

async def cut(registry, changed, notes, **more):
    if any(note.action.startswith(("trust.", "passphrase.")) for note in notes):
        os._exit(9)
    await commit(registry, changed, notes, **more)

Registry.commit_noted = cut
sys.exit(root.main(sys.argv[1:]))
"""


def test_what_was_cut_before_its_entry_is_in_the_audit_after_the_next_start(tmp_path: Path) -> None:
    controller = RunningController(tmp_path / "root")
    try:
        controller.start("-c", CUT_BEFORE_THE_ENTRY)
        with pytest.raises(UsageError, match="no change of the ca is under way"):
            controller.operator.rotate("ca", "finish")
        newest = controller.operator.audit()[-1].sequence
        with pytest.raises(UnreachableError):
            controller.operator.rotate("host-key", "begin", reason="planned")
        controller.wait()
        controller.start("-c", CUT_BEFORE_THE_ENTRY.replace('"trust.", ', ""))
        with pytest.raises(UnreachableError):
            controller.operator.set_passphrase(WORD, reason="")
        controller.wait()
        controller.start()
        operator = controller.operator
        cut, locked = operator.audit(after=newest)
        assert (cut.action, cut.subject) == ("trust.host-key.begin.cut", "host-key")
        assert "in force is trust document version 2, root key without a passphrase" in cut.detail
        assert cut.detail.endswith(": planned")
        assert locked.action == "passphrase.set.cut"
        assert "root key under a passphrase" in locked.detail
        assert all("uid " in entry.actor for entry in (cut, locked))
        assert {view.kind: view.phase for view in operator.rotations()}["host-key"] == "announced"
        controller.stop()
        controller.start()
        assert controller.operator.audit(after=locked.sequence) == []
        assert controller.operator.verify_audit().intact
    finally:
        controller.end()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    "verb",
    ["set", pytest.param("change", marks=pytest.mark.slow), pytest.param("remove", marks=pytest.mark.slow), "renew"],
)
def test_a_power_cut_at_any_step_of_a_passphrase_leaves_one_of_two_states(tmp_path: Path, verb: str) -> None:
    """After each cut the controller is before or after the change, and needs no passphrase to find out."""
    was, will = {"set": ("", WORD), "change": (WORD, OTHER), "remove": (WORD, ""), "renew": (WORD, WORD)}[verb]
    state = RunningController(tmp_path / "root", passphrase=was).paths.controller_state
    # A change of root under way, so that there are two root keys.
    state = cut_everywhere(state, tmp_path / "begin", "ca", "begin", was)[-1]
    before = Material(Files(state))
    cuts = cut_everywhere(state, tmp_path / "cuts", "passphrase", verb, was or will)
    words = []
    for cut in cuts:
        files = Files(cut)
        resume_files(files)
        found = Material(files)
        assert found.successor is not None
        opened_by = {opens(root) for root in (found.authority, found.successor)}
        assert len(opened_by) == 1, "two keys under two passphrases"
        words.append(opened_by.pop())
        started(cut, words[-1])
        if verb == "renew" and before.issuing is not None and found.issuing is not None:
            is_new = found.issuing.key_id != before.issuing.key_id
            assert (before.issuing.key_id in found.trust.revoked_node_keys) is is_new
    assert words == sorted(words, key=lambda word: word == will if was != will else 0)
    assert (words[0], words[-1]) == (was, will)
    assert len(cuts) > 6


def opens(root: Authority) -> str:
    """What opens a root's key."""
    if not root.is_locked:
        return ""
    for word in (WORD, OTHER):
        with contextlib.suppress(WrongPassphraseError):
            root.unlock(Secret(word.encode()))
            return word
    pytest.fail("neither the former nor the new passphrase opens it")


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


# ------------------------------------------------------------------------------------- passphrase and issuing CA


def test_a_passphrase_under_a_live_link(tmp_path: Path) -> None:
    """Set, used, changed, the issuing CA renewed and revoked, a restart in between; the links know nothing of it."""
    with running(tmp_path / "root", settings={"heartbeat_interval_s": 0.5}) as controller:
        operator = controller.operator
        plain = (controller.paths.controller_state / "root-ca.key").read_bytes()

        async def go() -> None:
            async with machine() as stand:
                se = await linked(stand, controller, "awake")
                view = await asyncio.to_thread(operator.set_passphrase, WORD, reason="test")
                assert view.root_is_locked
                assert plain not in (controller.paths.controller_state / "root-ca.key").read_bytes()
                await se.beat()
                await linked(stand, controller, "by-issuing")
                await se.refresh()

                # Whatever signs a trust document needs it; a wrong one is told, and changes nothing.
                with pytest.raises(PassphraseError, match="its passphrase is needed"):
                    await asyncio.to_thread(operator.rotate, "login-key", "begin")
                with pytest.raises(WrongPassphraseError, match="passphrase is wrong"):
                    await asyncio.to_thread(operator.rotate, "login-key", "begin", passphrase=f"in{WORD}")
                with pytest.raises(PassphraseError, match="wrong passphrase came before"):
                    await asyncio.to_thread(operator.rotate, "login-key", "begin", passphrase=WORD)
                assert all(entry.phase == "none" for entry in operator.rotations())
                await until_async(lambda: is_taken(controller), what="a passphrase is looked at again")
                await asyncio.to_thread(operator.rotate, "login-key", "finish", force=True, passphrase=WORD)
                await se.beat()

                # A start doesn't need it.
                se.close()
                controller.kill()
                await asyncio.to_thread(controller.start)
                await se.link()
                await se.beat()

                before = operator.controller().issuing_fingerprint
                view = await asyncio.to_thread(operator.renew_issuing, WORD, revoke=True, reason="test")
                assert view.issuing_fingerprint not in {before, ""}
                await se.beat()
                await se.refresh()
                assert len(se.trust.revoked_node_keys) == 1  # type: ignore[union-attr]
                await asyncio.to_thread(operator.change_passphrase, WORD, "another horse battery", reason="")
                with pytest.raises(UsageError, match="whoever reads this disk has the root key"):
                    await asyncio.to_thread(operator.remove_passphrase, WORD, force=False, reason="")
                await asyncio.to_thread(operator.remove_passphrase, "another horse battery", reason="")
                await se.beat()
                await linked(stand, controller, "by-the-root-again")

        asyncio.run(go())
        assert operator.verify_audit().intact
        actions = [entry.action for entry in operator.audit()]
        assert [action for action in actions if action.startswith(("passphrase.", "issuing-ca."))] == [
            "passphrase.set", "passphrase.wrong", "issuing-ca.revoked", "passphrase.changed", "passphrase.removed",
        ]  # fmt: skip
        told = controller.log.read_text() + repr(operator.audit()) + repr(operator.events())
        assert WORD not in told
        assert "another horse" not in told


def is_taken(controller: RunningController) -> bool:
    """Whether the wait after a wrong passphrase is over; a change of the log-in key is announced then."""
    try:
        return controller.operator.rotate("login-key", "begin", passphrase=WORD).phase == "announced"
    except TooSoonError:
        return False


def test_a_change_of_root_under_a_passphrase_takes_sleepers_and_old_images_along(tmp_path: Path) -> None:
    with running(tmp_path / "root", passphrase=WORD) as controller:
        operator, bundle = controller.operator, controller.bundle

        async def go() -> None:
            async with machine() as stand:
                se = await linked(stand, controller, "asleep")
                se.close()
                await asyncio.to_thread(operator.rotate, "ca", "begin", passphrase=WORD)
                assert any("no backup was taken" in text for text in operator.status().problems)
                out = tmp_path / "controller.backup"
                controller.command(
                    "controller", "backup", "--out", str(out), "--passphrase-file", "-", said="a passphrase of its own"
                )
                await asyncio.to_thread(operator.rotate, "ca", "finish", force=True, passphrase=WORD)
                assert not any("no backup was taken" in text for text in operator.status().problems)
                assert operator.controller().root_is_locked
                await asyncio.to_thread(operator.renew_issuing, WORD, reason="")
                # It trusts the old root alone, and never saw this issuing CA.
                await se.refresh()
                assert len(se.trust.roots) == 1  # type: ignore[union-attr]
                await se.link()
                late = stand.se(bundle, "old-image")
                await late.enroll()
                await late.link()

        asyncio.run(go())


def conversation(controller: RunningController, trust: TrustDocument) -> Conversation:
    """What an SE begins with, at 8443."""
    address = f"127.0.0.1:{controller.enroll_port}"
    return Conversation(address, trust=trust, clock=SystemClock(), connect_timeout_s=10.0, stop=StopToken())


def believed(controller: RunningController) -> TrustDocument:
    """The trust document of an SE that has followed until now."""
    raw = (controller.paths.controller_state / "trust.json").read_bytes()
    envelope = msgspec.json.decode(raw, type=Envelope)
    return msgspec.json.decode(envelope.body(), type=TrustDocument)


def test_ses_refuse_a_revoked_issuing_ca_and_name_it(tmp_path: Path) -> None:
    """Somebody has the issuing CA's files of before; whoever has the newer trust document doesn't believe them."""
    with running(tmp_path / "root", passphrase=WORD) as controller:
        state = controller.paths.controller_state
        names = ("issuing-ca.pem", "issuing-ca.key", "node.pem", "node.key")
        stolen = {name: (state / name).read_bytes() for name in names}
        before = believed(controller)
        controller.operator.renew_issuing(WORD, revoke=True, reason="stolen")
        trust = believed(controller)
        with conversation(controller, trust) as there:
            there.check_time(time.time())
        controller.kill()
        for name, content in stolen.items():
            (state / name).write_bytes(content)
        controller.start()
        with (
            pytest.raises(TrustError, match=r"the issuing CA .* was revoked") as caught,
            conversation(controller, trust),
        ):
            pass
        assert caught.value.code == "TRUST-004"
        with conversation(controller, before):
            pass
        controller.operator.renew_issuing(WORD, reason="")
        with conversation(controller, trust):
            pass


def test_an_issuing_ca_at_its_end_is_told_and_renewed(tmp_path: Path) -> None:
    """A controller that nobody looked after: it starts, says what to do, and SEs name the cause until that is done."""
    with running(tmp_path / "root", passphrase=WORD, date="2024-06-01T00:00+00:00") as controller:
        operator, trust = controller.operator, believed(controller)
        problems = operator.status().problems
        assert any("the issuing CA has expired: `appliance controller issuing-ca renew`" in text for text in problems)
        assert any(event.kind == "trust.expires" and "issuing CA" in event.text for event in operator.events())
        with conversation(controller, trust) as there:
            with pytest.raises(TrustError, match=r"expired at .*, as did 'CN=issuing") as caught:
                there.check_time(time.time())
            assert caught.value.code == "TRUST-006"
            assert "issuing-ca renew" in caught.value.hint
        assert 'appliance_expiry_timestamp_seconds{what="issuing CA"}' in metrics(controller)
        ends = operator.renew_issuing(WORD, reason="").issuing_expires_at
        assert ends > time.time() + 364 * 86_400
        assert not any("issuing CA" in text or "node certificate" in text for text in operator.status().problems)
        with conversation(controller, trust) as there:
            there.check_time(time.time())
        assert f'appliance_expiry_timestamp_seconds{{what="issuing CA"}} {ends}' in metrics(controller)


def metrics(controller: RunningController) -> str:
    url = f"http://127.0.0.1:{controller.bound['metrics_port']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def test_the_command_line_reads_passphrases_and_never_as_arguments(tmp_path: Path) -> None:
    with running(tmp_path / "root") as controller:
        (tmp_path / "word").write_text(WORD + "\n")
        (tmp_path / "other").write_text(OTHER + "\n")
        unlock, new = ("--passphrase-file", str(tmp_path / "word")), ("--new-passphrase-file", str(tmp_path / "word"))
        done = controller.command("controller", "passphrase", "set", check=False)
        assert done.returncode == 2
        assert "no terminal to ask on" in done.stderr
        told = controller.command("controller", "passphrase", "set", *new).stdout
        assert "take a new one, destroy those" in told
        shown = json.loads(controller.command("controller", "show", "--json").stdout)
        assert shown["root_is_locked"]
        assert "under a passphrase" in controller.command("controller", "show").stdout
        wrong = controller.command(
            "controller", "rotate-ca", "begin", "--passphrase-file", str(tmp_path / "other"), check=False
        )
        assert wrong.returncode == 6
        assert "the passphrase is wrong" in wrong.stderr
        until(lambda: begun(controller, unlock), what="the passphrase is looked at again")
        assert "take a backup now" in controller.command("controller", "rotate-ca", "status").stdout
        told = controller.command("controller", "rotate-ca", "abort", *unlock, "--reason", "not today").stdout
        assert "no change is under way" in told
        assert "backup" not in told
        assert root_of(controller) == shown["root_fingerprint"]
        told = controller.command("controller", "rotate-ca", "begin", *unlock).stdout
        assert "the successor is announced" in told
        assert "nobody" in told
        controller.command("controller", "rotate-ca", "finish", "--passphrase-file", "-", said=WORD + "\n")
        assert root_of(controller) != shown["root_fingerprint"]
        done = controller.command("controller", "passphrase", "remove", *unlock, check=False)
        assert done.returncode == 2
        assert "--force" in done.stderr
        changed = ("--new-passphrase-file", str(tmp_path / "other"))
        controller.command("controller", "passphrase", "change", *unlock, *changed)
        renewed = json.loads(
            controller.command(
                "controller", "issuing-ca", "renew", "--passphrase-file", str(tmp_path / "other"), "--json"
            ).stdout
        )
        assert renewed["issuing_fingerprint"] != shown["issuing_fingerprint"]


def begun(controller: RunningController, unlock: tuple[str, ...]) -> bool:
    return controller.command("controller", "rotate-ca", "begin", *unlock, check=False).returncode == 0
