"""Who gets in: every policy, tokens, approval, hook and rejoin, with simulated SEs against a real controller."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from rig import Machine, RunningController, machine, running, until, until_async

from appliance.errors import ApplianceError, EnrollError, UsageError
from appliance.lab.simulated import SimulatedSe
from appliance.pki.identity import Identity
from appliance.protocol import enroll, jws, token
from appliance.protocol.enroll import Grant, InstanceFacts, Pending, Policy
from appliance.protocol.operator import ImageKeyTermsWish, TokenWish
from appliance.protocol.seed import Bundle

Work = Callable[[Machine], Awaitable[None]]


def run(work: Work) -> None:
    """Runs `work` with a machine for simulated SEs."""

    async def go() -> None:
        async with machine() as stand:
            await work(stand)

    asyncio.run(go())


def key(controller: RunningController, policy: Policy, **more: object) -> Bundle:
    return controller.operator.create_image_key(ImageKeyTermsWish(policy=policy, **more)).bundle  # type: ignore[arg-type]


def uses(controller: RunningController, bundle: Bundle) -> int:
    return {each.image_key_id: each.uses for each in controller.operator.image_keys()}[bundle.image_key_id]


def token_status(controller: RunningController, text: str) -> str:
    wanted = token.token_id(token.digest(text))
    return {each.token_id: each.status for each in controller.operator.tokens()}[wanted]


def actions(controller: RunningController, subject: str) -> list[str]:
    return [entry.action for entry in controller.operator.audit(limit=10_000) if entry.subject == subject]


async def refusal(asked: Awaitable[object]) -> str:
    """The code with which something is refused."""
    with pytest.raises(EnrollError) as refused:
        await asked
    return refused.value.code


@asynccontextmanager
async def waiting(controller: RunningController, stand: Machine, **more: object) -> AsyncIterator[SimulatedSe]:
    """An SE that waits for approval."""
    se = stand.se(key(controller, Policy.APPROVE, **more), f"w-{uuid.uuid4().hex[:8]}")
    assert isinstance(await se.ask_in(), Pending)
    yield se


def restart_later(controller: RunningController, by_s: float) -> None:
    """Stops it, and starts it with a clock that went on."""
    assert controller.stop() == 0
    settings = controller.paths.settings_file
    settings.write_text(settings.read_text().replace("[clock]", f"[clock]\noffset_s = {by_s}"))
    controller.start()


# Tokens.


def test_a_token_lets_one_se_in_once(controller: RunningController) -> None:
    bundle = key(controller, Policy.TOKEN)
    made = controller.operator.create_token(TokenWish(image_key_id=bundle.image_key_id, note="rack 7"))

    async def work(stand: Machine) -> None:
        se, second = stand.se(bundle, "with-token"), stand.se(bundle)
        assert await refusal(se.enroll()) == "ENROLL-025"
        se.token = "enroll-" + "A" * 43
        assert await refusal(se.enroll()) == "ENROLL-027"
        se.token = made.token
        first = await se.enroll()
        assert (await se.enroll()).number == first.number, "a lost answer strands nobody, though the token is used"
        second.token = made.token
        assert await refusal(second.enroll()) == "ENROLL-028"
        assert uses(controller, bundle) == 1
        await se.link()
        await se.beat()

    run(work)
    assert token_status(controller, made.token) == "used"
    assert actions(controller, made.view.token_id) == ["token.created"]


def test_one_token_with_fifty_at_once_lets_one_in(controller: RunningController) -> None:
    bundle = key(controller, Policy.TOKEN)
    made = controller.operator.create_token(TokenWish(image_key_id=bundle.image_key_id))

    async def work(stand: Machine) -> None:
        ses = [stand.se(bundle) for _ in range(50)]
        for se in ses:
            se.token = made.token
        results = await asyncio.gather(*(se.enroll() for se in ses), return_exceptions=True)
        assert sum(isinstance(result, Grant) for result in results) == 1
        assert {result.code for result in results if isinstance(result, EnrollError)} == {"ENROLL-028"}
        assert uses(controller, bundle) == 1

    run(work)


def test_max_uses_one_with_fifty_at_once_grants_one(controller: RunningController) -> None:
    bundle = key(controller, Policy.OPEN, max_uses=1)

    async def work(stand: Machine) -> None:
        results = await asyncio.gather(*(stand.se(bundle).enroll() for _ in range(50)), return_exceptions=True)
        assert sum(isinstance(result, Grant) for result in results) == 1
        assert {result.code for result in results if isinstance(result, EnrollError)} == {"ENROLL-009"}

    run(work)


def test_a_token_is_bound_to_its_image_key_and_instance(controller: RunningController) -> None:
    bundle, other = key(controller, Policy.TOKEN), key(controller, Policy.TOKEN)
    wish = TokenWish(image_key_id=bundle.image_key_id, instance_id="i-7")
    text = controller.operator.create_token(wish).token

    async def work(stand: Machine) -> None:
        wrong_key, wrong_vm, right = stand.se(other), stand.se(bundle), stand.se(bundle)
        for se in (wrong_key, wrong_vm, right):
            se.token = text
        wrong_key.facts = right.facts = InstanceFacts(instance_id="i-7")
        assert await refusal(wrong_key.enroll()) == "ENROLL-035"
        assert await refusal(wrong_vm.enroll()) == "ENROLL-035"
        await right.enroll()

    run(work)


def test_revoked_and_expired_tokens_open_nothing(tmp_path: Path) -> None:
    with running(tmp_path / "root") as controller:
        bundle = key(controller, Policy.TOKEN)
        revoked, old = (controller.operator.create_token(TokenWish(expires_in_s=60)) for _ in range(2))
        controller.command("token", "revoke", revoked.view.token_id, "--reason", "sent to the wrong person")

        async def work(stand: Machine) -> None:
            se = stand.se(bundle)
            se.token = revoked.token
            assert await refusal(se.enroll()) == "ENROLL-034"

        run(work)
        restart_later(controller, 120.0)

        async def later(stand: Machine) -> None:
            se = stand.se(bundle)
            se.token = old.token
            assert await refusal(se.enroll()) == "ENROLL-029"

        run(later)
        assert {each.status for each in controller.operator.tokens()} == {"revoked", "expired"}


def test_a_token_is_printed_once_and_kept_as_its_hash(controller: RunningController) -> None:
    bundle = key(controller, Policy.TOKEN)
    done = controller.command("token", "create", "--image-key", bundle.image_key_id, "--note", "n")
    text = done.stdout.strip()
    assert token.parse(text).kind is token.Kind.ENROLL
    assert text not in done.stderr
    digest = token.digest(text)
    listed = controller.command("token", "list", "--json").stdout
    assert token.token_id(digest) in listed
    places = {
        "list": listed,
        "log": controller.log.read_text(),
        "audit": controller.command("audit", "show", "--json").stdout,
        "events": controller.command("events", "--json").stdout,
        "store": b"".join(path.read_bytes() for path in controller.paths.controller_state.glob("store.sqlite*")).decode(
            "latin1"
        ),
    }
    secret = text.removeprefix("enroll-")
    assert not [place for place, content in places.items() if secret in content]
    assert digest in places["store"]


def test_what_makes_no_sense_of_a_token_is_refused(controller: RunningController) -> None:
    for wish, words in (
        (TokenWish(image_key_id=controller.bundle.image_key_id), "is open"),
        (TokenWish(image_key_id="ik-000000000000"), "no image key"),
        (TokenWish(rejoin="nobody"), "no SE"),
        (TokenWish(rejoin="nobody", image_key_id="ik-000000000000"), "no SE"),
        (TokenWish(expires_in_s=1), "minute"),
    ):
        with pytest.raises(ApplianceError, match=words):
            controller.operator.create_token(wish)
    refused = controller.command("token", "create", "--rejoin", "x", "--image-key", "y", check=False)
    assert refused.returncode == 2


# Approval.


def test_an_se_waits_until_it_is_approved(controller: RunningController) -> None:
    async def work(stand: Machine) -> None:
        async with waiting(controller, stand) as se:
            again = await se.ask_in()
            assert isinstance(again, Pending)
            assert again.fingerprint == se.identity.thumbprint
            assert (await se.ask(enroll.REFRESH_PATH, se.signed_refresh)).status == 202
            assert uses(controller, se.bundle) == 1
            shown = controller.command("se", "pending").stdout
            assert se.identity.thumbprint in shown
            assert controller.state(se.name) == "PENDING AWAITS_APPROVAL"
            assert se.identity.thumbprint in controller.operator.why(se.name).verdict
            with pytest.raises(Exception, match=r"Permission denied|grant"):
                await se.link()
            controller.command("se", "approve", se.identity.thumbprint)
            await se.refresh()
            await se.link()
            await se.beat()
            await until_async(lambda: controller.state(se.name) == "UP OK", what="UP")
            assert uses(controller, se.bundle) == 1
            controller.command("se", "approve", se.name)  # said twice it is still so
            assert actions(controller, se.se_id)[:2] == ["enroll.pending", "se.approved"]
            assert actions(controller, se.se_id).count("se.approved") == 1

    run(work)


def test_an_approval_for_another_fingerprint_lets_nobody_in(controller: RunningController) -> None:
    async def work(stand: Machine) -> None:
        async with waiting(controller, stand) as se:
            other = Identity.create().thumbprint
            with pytest.raises(UsageError, match="another key"):
                controller.operator.approve_se(se.name, fingerprint=other)
            assert controller.command("se", "approve", other, check=False).returncode == 10
            assert controller.operator.se(se.name).status == "pending"

    run(work)


def test_an_se_that_asked_before_its_image_key_ended_may_be_approved_after_that(tmp_path: Path) -> None:
    """The end of a key ends the asking; who asked in time needs a person's word alone."""
    with running(tmp_path / "root") as controller:

        async def work(stand: Machine) -> None:
            async with waiting(controller, stand, expires_in_s=60) as se:
                restart_later(controller, 120.0)
                late = stand.se(se.bundle, "too-late")
                assert await refusal(late.ask_in()) == "ENROLL-008"
                assert isinstance(await se.ask_in(), Pending)
                controller.command("se", "approve", se.name)
                assert isinstance(await se.ask_in(), Grant)
                await se.link()
                await se.beat()
                assert controller.operator.se(se.name).status == "enrolled"
                assert await refusal(late.ask_in()) == "ENROLL-008", "it was let in for itself, and nobody beside it"
                assert uses(controller, se.bundle) == 1

        run(work)


def test_a_rejected_se_stays_out_until_it_is_reinstated(controller: RunningController) -> None:
    async def work(stand: Machine) -> None:
        async with waiting(controller, stand, max_uses=1) as se:
            controller.command("se", "reject", se.name, "--reason", "who is that?")
            assert uses(controller, se.bundle) == 0, "what it took is free again"
            for ask in (se.ask_in, se.refresh):
                assert await refusal(ask()) == "ENROLL-015"
            assert "who is that?" in controller.operator.why(se.name).verdict
            with pytest.raises(UsageError, match="can't approve"):
                controller.operator.approve_se(se.name)
            controller.command("se", "reinstate", se.name, "--reason", "mistake")
            assert uses(controller, se.bundle) == 1
            assert (await se.ask(enroll.REFRESH_PATH, se.signed_refresh)).status == 202
            controller.command("se", "approve", se.name)
            await se.refresh()
            await se.link()
            await se.beat()
            await until_async(lambda: controller.state(se.name) == "UP OK", what="UP")

    run(work)
    assert controller.operator.verify_audit().intact


def test_a_token_that_waits_with_its_se_is_free_again_when_that_is_rejected(controller: RunningController) -> None:
    bundle = key(controller, Policy.APPROVE)
    made = controller.operator.create_token(TokenWish(image_key_id=bundle.image_key_id))

    async def work(stand: Machine) -> None:
        se, second = stand.se(bundle, "holds-a-token"), stand.se(bundle, "comes-second")
        se.token = second.token = made.token
        await se.ask_in()
        assert token_status(controller, made.token) == "taken"
        (shown,) = (each for each in controller.operator.pending() if each.se_id == se.se_id)
        assert shown.token_id == made.view.token_id
        controller.command("se", "reject", se.name)
        assert token_status(controller, made.token) == "good"
        await second.ask_in()
        controller.command("se", "approve", second.name)
        assert token_status(controller, made.token) == "used"

    run(work)


def test_a_request_that_nobody_answers_lapses_and_is_made_anew(tmp_path: Path) -> None:
    with running(tmp_path / "root", settings={"pending_life_s": 3.0}) as controller:
        bundle = key(controller, Policy.APPROVE, max_uses=1)
        made = controller.operator.create_token(TokenWish(image_key_id=bundle.image_key_id))

        async def work(stand: Machine) -> None:
            se = stand.se(bundle, "patient")
            se.token = made.token
            await se.ask_in()
            assert uses(controller, bundle) == 1
            await until_async(lambda: not controller.operator.pending(), what="it lapses")
            assert uses(controller, bundle) == 0
            assert token_status(controller, made.token) == "good"
            assert await refusal(se.refresh()) == "ENROLL-022"
            assert isinstance(await se.ask_in(), Pending), "an SE that still lives asks anew"
            # By the API: the command line takes longer to start than a request lives here.
            controller.operator.approve_se(se.name)
            assert (await se.refresh()).number == 2, "no number is given twice"
            await se.link()

        run(work)
        assert [event.kind for event in controller.operator.events()].count("enroll.lapsed") == 1
        controller.kill()
        controller.start()
        assert [se.number for se in controller.operator.ses()] == [2]
        assert controller.operator.verify_audit().intact


# The hook.


def hook(path: Path, lines: str) -> str:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("lines", "outcome"),
    [
        ("exit 0", "granted"),
        ("exit 10", "ENROLL-036"),
        ("exit 1", "pending"),
        ("kill -9 $$", "pending"),
        ("sleep 60", "pending"),
        ("setsid sleep 20 & exec sleep 20", "pending"),
    ],
)
def test_the_hook_decides_or_an_operator_does(tmp_path: Path, lines: str, outcome: str) -> None:
    program = hook(tmp_path / "hook", lines)
    with running(tmp_path / "root", settings={"enroll_hook": program}) as controller:
        bundle = key(controller, Policy.HOOK)

        async def work(stand: Machine) -> None:
            se, other = stand.se(bundle, "hooked"), stand.se(controller.bundle, "beside")
            asked = asyncio.create_task(se.ask_in())
            # Whoever doesn't need the hook doesn't wait for it.
            await asyncio.wait_for(other.enroll(), 4)
            if outcome.startswith("ENROLL"):
                assert await refusal(asked) == outcome
            elif outcome == "pending":
                assert isinstance(await asked, Pending)
                controller.command("se", "approve", "hooked")
                await se.refresh()
            else:
                assert isinstance(await asked, Grant)

        run(work)


def test_the_hook_is_told_the_facts_and_nothing_of_ours(tmp_path: Path) -> None:
    seen, environment = tmp_path / "seen", tmp_path / "environment"
    program = hook(tmp_path / "hook", f"cat > {seen}; env > {environment}; echo welcome >&2; exit 0")
    with running(tmp_path / "root", settings={"enroll_hook": program}) as controller:
        bundle = key(controller, Policy.HOOK)

        async def work(stand: Machine) -> None:
            se = stand.se(bundle, "hooked")
            await se.enroll()
            facts = json.loads(seen.read_text())
            assert facts["fingerprint"] == se.identity.thumbprint
            assert (facts["se_id"], facts["image_key_id"], facts["source"], facts["name"]) == (
                se.se_id, bundle.image_key_id, "127.0.0.1", "hooked",
            )  # fmt: skip
            assert facts["facts"]["instance_id"] == "hooked"

        run(work)
        names = {line.partition("=")[0] for line in environment.read_text().splitlines()}
        assert names <= {"PATH", "LANG", "PWD", "_", "SHLVL", "OLDPWD"}
        until(lambda: "welcome" in controller.log.read_text(), what="what the hook said is told")


def test_a_hook_key_needs_a_hook(controller: RunningController) -> None:
    with pytest.raises(UsageError, match="enroll_hook"):
        key(controller, Policy.HOOK)


# Rejoin.


def test_a_rejoin_takes_the_place_of_the_lost_machine(controller: RunningController) -> None:
    async def work(stand: Machine) -> None:
        lost, new = stand.se(controller.bundle, "lost"), stand.se(controller.bundle, "found")
        before = await lost.enroll()
        await lost.link()
        await lost.beat()
        count = uses(controller, controller.bundle)
        new.token = controller.command("token", "create", "--rejoin", "lost").stdout.strip()
        conn = lost.conn
        assert conn is not None
        after = await new.rejoin()
        await asyncio.wait_for(conn.wait_closed(), 5)
        assert (after.number, after.address, after.name) == (before.number, before.address, before.name)
        assert uses(controller, controller.bundle) == count, "no image key had a part in it"
        # A lost answer: the same key and token again.
        again = await new.ask(enroll.REJOIN_PATH, new.signed_rejoin)
        assert again.status == 201
        # The old key is nobody's any more.
        assert await refusal(lost.refresh()) == "ENROLL-022"
        assert await refusal(lost.enroll()) == "ENROLL-012"
        with pytest.raises(Exception, match="Permission denied"):
            await lost.connect()
        await new.link()
        await new.beat()
        await until_async(lambda: controller.state("lost") == "UP OK", what="UP")
        spent = await new.ask(enroll.REJOIN_PATH, new.signed_rejoin)
        assert spent.status == 409
        detail = controller.operator.se("lost")
        assert (detail.thumbprint, detail.facts) == (new.identity.thumbprint, new.facts)
        assert actions(controller, new.se_id).count("enroll.rejoined") == 1
        third = stand.se(controller.bundle)
        third.token = new.token
        assert await refusal(third.rejoin()) == "ENROLL-028"
        controller.kill()
        new.close()
        controller.start()
        await new.link()

    run(work)
    assert controller.operator.verify_audit().intact


def test_one_rejoin_token_twice_at_once_serves_one(controller: RunningController) -> None:
    async def work(stand: Machine) -> None:
        lost = stand.se(controller.bundle, "lost-twice")
        await lost.enroll()
        made = controller.operator.create_token(TokenWish(rejoin="lost-twice"))
        ses = [stand.se(controller.bundle) for _ in range(20)]
        for se in ses:
            se.token = made.token
        results = await asyncio.gather(*(se.rejoin() for se in ses), return_exceptions=True)
        (winner,) = (se for se, result in zip(ses, results, strict=True) if isinstance(result, Grant))
        assert {result.code for result in results if isinstance(result, EnrollError)} == {"ENROLL-028"}
        assert controller.operator.se("lost-twice").thumbprint == winner.identity.thumbprint

    run(work)


def test_a_rejoin_goes_by_its_own_token_for_an_enrolled_se_only(controller: RunningController) -> None:
    bundle = key(controller, Policy.TOKEN)
    plain = controller.operator.create_token(TokenWish(image_key_id=bundle.image_key_id)).token

    async def work(stand: Machine) -> None:
        lost, other, thief = (stand.se(controller.bundle, name) for name in ("lost-3", "other-3", "thief"))
        await lost.enroll()
        await other.enroll()
        lost_token, other_token = (
            controller.operator.create_token(TokenWish(rejoin=name)).token for name in ("lost-3", "other-3")
        )

        async def attempt(text: str, se_id: str) -> str:
            thief.token, thief.se_id, thief.identity = text, se_id, Identity.create()
            return (await thief.ask(enroll.REJOIN_PATH, thief.signed_rejoin)).body.decode()

        assert "ENROLL-035" in await attempt(other_token, lost.se_id)
        assert "ENROLL-035" in await attempt(plain, lost.se_id)
        assert "ENROLL-025" in await attempt("", lost.se_id)
        assert "ENROLL-022" in await attempt(lost_token, str(uuid.uuid4()))
        # A rejoin token isn't one beside an image key, and a refresh is no rejoin.
        thief.bundle, thief.token, thief.se_id = bundle, lost_token, str(uuid.uuid4())
        assert await refusal(thief.enroll()) == "ENROLL-035"
        assert (await lost.ask(enroll.REJOIN_PATH, lost.signed_refresh)).status == 400
        # Nor does it undo a revocation.
        controller.command("se", "revoke", "lost-3")
        assert "ENROLL-014" in await attempt(lost_token, lost.se_id)
        controller.command("se", "reinstate", "lost-3")
        await lost.link()
        with pytest.raises(ApplianceError, match=r"is pending|only an enrolled"):
            async with waiting(controller, stand) as se:
                controller.operator.create_token(TokenWish(rejoin=se.name))

    run(work)


def test_a_rejoin_is_signed_by_the_new_key(controller: RunningController) -> None:
    async def work(stand: Machine) -> None:
        lost, new = stand.se(controller.bundle, "lost-4"), stand.se(controller.bundle)
        await lost.enroll()
        new.token = controller.operator.create_token(TokenWish(rejoin="lost-4")).token
        new.se_id = lost.se_id

        def forged(nonce: str) -> bytes:
            document = json.loads(new.signed_rejoin(nonce))
            wrong = Identity.create().sign(b"something else")
            document["signatures"][0]["signature"] = jws.encode_part(wrong)
            return json.dumps(document).encode()

        answer = await new.ask(enroll.REJOIN_PATH, forged)
        assert msgspec.json.decode(answer.body)["code"] == "ENROLL-003"
        assert controller.operator.se("lost-4").thumbprint == lost.identity.thumbprint

    run(work)


def test_a_rejoin_without_a_good_token_leaves_no_trace_in_the_audit(controller: RunningController) -> None:
    """It takes a key that anybody can make, and an se_id that many know: of an SE that waits no less than of any."""

    async def work(stand: Machine) -> None:
        enrolled, stranger = stand.se(controller.bundle, "lost-5"), stand.se(controller.bundle)
        await enrolled.enroll()
        async with waiting(controller, stand) as pending:
            before = controller.operator.status().refusals
            for known in (pending.se_id, enrolled.se_id):
                written = actions(controller, known)
                for text, code in (("", "ENROLL-025"), (token.compose(bytes(32), rejoin=known), "ENROLL-027")):
                    stranger.se_id, stranger.token, stranger.identity = known, text, Identity.create()
                    answer = await stranger.ask(enroll.REJOIN_PATH, stranger.signed_rejoin)
                    assert msgspec.json.decode(answer.body)["code"] == code
                assert actions(controller, known) == written
                told = [event.kind for event in controller.operator.events() if event.subject == known]
                assert "enroll.refused" not in told
            counted = controller.operator.status().refusals
            assert [counted[code] - before.get(code, 0) for code in ("ENROLL-025", "ENROLL-027")] == [2, 2]

    run(work)


# Undoing.


def test_a_revoked_se_comes_back_when_reinstated_and_a_deleted_one_never(controller: RunningController) -> None:
    async def work(stand: Machine) -> None:
        se = stand.se(controller.bundle, "mistaken")
        await se.enroll()
        await se.link()
        controller.command("se", "revoke", "mistaken", "--reason", "mixed up")
        with pytest.raises(Exception, match="Permission denied"):
            await se.connect()
        controller.command("se", "reinstate", "mistaken")
        se.close()
        await se.refresh()
        await se.link()
        await se.beat()
        await until_async(lambda: controller.state("mistaken") == "UP OK", what="UP")
        undone = [action for action in actions(controller, se.se_id) if action.startswith("se.")]
        assert undone == ["se.revoked", "se.reinstated"]
        number = str(controller.operator.se("mistaken").summary.number)
        controller.command("se", "delete", "mistaken", "--yes")
        refused = controller.command("se", "reinstate", number, check=False)
        assert (refused.returncode, "enroll --anew" in refused.stderr) == (2, True)
        assert await refusal(se.refresh()) == "ENROLL-017"

    run(work)


def test_pending_ses_are_told_by_status_and_doctor(controller: RunningController) -> None:
    async def work(stand: Machine) -> None:
        async with waiting(controller, stand):
            assert any("for approval" in text for text in controller.operator.status().problems)

    run(work)
    until(lambda: any(event.kind == "enroll.pending" for event in controller.operator.events()), what="told")
