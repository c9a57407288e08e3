"""Stage enroll against a real controller: every way a request can be wrong, and what must survive."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import ssl
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from rig import RunningController, link_in_turn, machine, running, until

from appliance.errors import EnrollError
from appliance.lab.simulated import Answer, SimulatedSe, exchange
from appliance.pki import jws as signatures
from appliance.pki import tls
from appliance.pki.identity import Identity
from appliance.protocol import enroll, jws
from appliance.protocol.enroll import Grant, NonceAnswer
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.protocol.problem import Problem

Edit = Callable[[dict], None]


def send(controller: RunningController, path: str, body: Callable[[str, SimulatedSe], bytes]) -> Answer:
    """Posts what `body` makes of a fresh nonce and a fresh SE."""

    async def go() -> Answer:
        async with machine() as stand:
            se = stand.se(controller.bundle)
            return await se.ask(path, lambda nonce: body(nonce, se))

    return asyncio.run(go())


def code(answer: Answer) -> str:
    return msgspec.json.decode(answer.body, type=Problem).code


def edited(change: Edit) -> Callable[[str, SimulatedSe], bytes]:
    """A good enrollment whose outer JSON was changed."""

    def make(nonce: str, se: SimulatedSe) -> bytes:
        document = json.loads(se.signed_enrollment(nonce))
        change(document)
        return json.dumps(document).encode()

    return make


def change_payload(document: dict) -> None:
    payload = json.loads(jws.decode_part(document["payload"]))
    payload["agent_version"] = "9.9.9"
    document["payload"] = jws.encode_part(json.dumps(payload).encode())


def swap_signature(index: int) -> Edit:
    def change(document: dict) -> None:
        wrong = Identity.create().sign(b"something else")
        document["signatures"][index]["signature"] = jws.encode_part(wrong)

    return change


ATTACKS: dict[str, tuple[Edit, str]] = {
    "no image signature": (lambda d: d["signatures"].pop(0), "ENROLL-001"),
    "no SE signature": (lambda d: d["signatures"].pop(1), "ENROLL-001"),
    "image signature doubled": (lambda d: d["signatures"].__setitem__(1, d["signatures"][0]), "ENROLL-001"),
    "SE signature doubled": (lambda d: d["signatures"].__setitem__(0, d["signatures"][1]), "ENROLL-001"),
    "a third signature": (lambda d: d["signatures"].append(d["signatures"][1]), "ENROLL-001"),
    "swapped order": (lambda d: d["signatures"].reverse(), "ENROLL-001"),
    "unprotected header": (lambda d: d["signatures"][0].__setitem__("header", {"kid": "x"}), "ENROLL-001"),
    "image signature by another key": (swap_signature(0), "ENROLL-003"),
    "SE signature by another key": (swap_signature(1), "ENROLL-003"),
    "payload changed": (change_payload, "ENROLL-003"),
    "an unknown field": (lambda d: d.__setitem__("extra", 1), "ENROLL-001"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_forged_request_is_refused(controller: RunningController, name: str) -> None:
    change, wanted = ATTACKS[name]
    answer = send(controller, enroll.ENROLL_PATH, edited(change))
    assert code(answer) == wanted
    assert answer.status in {400, 403}


def test_a_kid_that_is_not_the_ses_own_is_refused(controller: RunningController) -> None:
    """Signed by the key in the payload, but it says to be another's: what is logged and looked up must be one key."""

    def make(nonce: str, se: SimulatedSe) -> bytes:
        payload = jws.decode_part(json.loads(se.signed_enrollment(nonce))["payload"])
        image = Identity.from_pkcs8(se.bundle.image_key.encode())
        signers = [("image", se.bundle.image_key_id, image), ("se", Identity.create().thumbprint, se.identity)]
        return signatures.sign(payload, signers)  # type: ignore[arg-type]

    answer = send(controller, enroll.ENROLL_PATH, make)
    assert code(answer) == "ENROLL-001"
    assert b"the second kid" in answer.body


def test_a_refresh_by_another_key_is_refused(controller: RunningController) -> None:
    """Who knows an SE's id and fingerprint, which are no secrets, gets no grant of it."""

    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "refreshed")
            await se.enroll()
            own, thief = se.identity, Identity.create()

            def signed(nonce: str, kid: str) -> bytes:
                payload = jws.decode_part(json.loads(se.signed_refresh(nonce))["payload"])
                return signatures.sign(payload, [("se", kid, thief)])

            for kid, wanted in ((own.thumbprint, "ENROLL-003"), (thief.thumbprint, "ENROLL-022")):
                answer = await se.ask(enroll.REFRESH_PATH, lambda nonce, kid=kid: signed(nonce, kid))
                assert code(answer) == wanted
            await se.refresh()

    asyncio.run(go())


def test_a_name_that_stands_twice_is_refused(controller: RunningController) -> None:
    def make(nonce: str, se: SimulatedSe) -> bytes:
        return se.signed_enrollment(nonce).replace(b'{"payload":', b'{"payload":"e30","payload":', 1)

    assert code(send(controller, enroll.ENROLL_PATH, make)) == "ENROLL-001"


def test_the_image_key_in_both_roles_is_refused(controller: RunningController) -> None:
    def make(nonce: str, se: SimulatedSe) -> bytes:
        se.identity = Identity.from_pkcs8(se.bundle.image_key.encode())
        return se.signed_enrollment(nonce)

    assert code(send(controller, enroll.ENROLL_PATH, make)) == "ENROLL-018"


def test_a_key_that_has_another_role_is_refused(controller: RunningController) -> None:
    from appliance.pki import ssh_keys

    login = ssh_keys.load_private((controller.paths.controller_state / "id_se").read_bytes())

    def make(nonce: str, se: SimulatedSe) -> bytes:
        se.identity = Identity.from_pkcs8(ssh_keys.to_pkcs8(login).reveal())
        return se.signed_enrollment(nonce)

    assert code(send(controller, enroll.ENROLL_PATH, make)) == "ENROLL-018"


def test_an_unknown_image_key_is_refused(controller: RunningController) -> None:
    def make(nonce: str, se: SimulatedSe) -> bytes:
        se.bundle = msgspec.structs.replace(se.bundle, image_key_id="ik-000000000000")
        return se.signed_enrollment(nonce)

    assert code(send(controller, enroll.ENROLL_PATH, make)) == "ENROLL-002"


def test_a_request_for_another_cluster_is_refused(controller: RunningController) -> None:
    def make(nonce: str, se: SimulatedSe) -> bytes:
        se.bundle = msgspec.structs.replace(se.bundle, cluster_id=str(uuid.uuid4()))
        return se.signed_enrollment(nonce)

    assert code(send(controller, enroll.ENROLL_PATH, make)) == "ENROLL-004"


def test_a_stale_nonce_is_answered_with_a_fresh_one(controller: RunningController) -> None:
    answer = send(controller, enroll.ENROLL_PATH, lambda _nonce, se: se.signed_enrollment("A" * 54))
    problem = msgspec.json.decode(answer.body, type=Problem)
    assert (problem.code, answer.status) == ("ENROLL-005", 409)
    assert problem.nonce


def test_the_same_nonce_twice_at_once_enrolls_one(controller: RunningController) -> None:
    async def go() -> list[Answer]:
        async with machine() as stand:
            ses = [stand.se(controller.bundle) for _ in range(8)]
            reader, writer = await ses[0]._tls()
            nonce = (await exchange(reader, writer, enroll.NONCE_PATH, b"")).decode(NonceAnswer).nonce
            writer.close()
            return await asyncio.gather(
                *(se.ask(enroll.ENROLL_PATH, lambda _n, s=se: s.signed_enrollment(nonce)) for se in ses)
            )

    answers = asyncio.run(go())
    assert sorted(answer.status for answer in answers) == [201] + [409] * 7
    assert {code(answer) for answer in answers if answer.status == 409} == {"ENROLL-006"}


def test_max_uses_one_with_twenty_at_once_grants_one(controller: RunningController) -> None:
    bundle = controller.operator.create_image_key(ImageKeyTermsWish(max_uses=1)).bundle

    async def go() -> list[object]:
        async with machine() as stand:
            ses = [stand.se(bundle) for _ in range(20)]
            return await asyncio.gather(*(se.enroll() for se in ses), return_exceptions=True)

    results = asyncio.run(go())
    assert sum(isinstance(result, Grant) for result in results) == 1
    assert {result.code for result in results if isinstance(result, EnrollError)} == {"ENROLL-009"}


def test_a_revoked_image_key_opens_nothing_and_leaves_its_ses_alone(controller: RunningController) -> None:
    bundle = controller.operator.create_image_key(ImageKeyTermsWish()).bundle

    async def go() -> None:
        async with machine() as stand:
            first = stand.se(bundle, "kept")
            await first.enroll()
            await first.link()
            controller.command("image-key", "revoke", bundle.image_key_id, "--reason", "test")
            with pytest.raises(EnrollError) as refused:
                await stand.se(bundle).enroll()
            assert refused.value.code == "ENROLL-007"
            await first.beat()

    asyncio.run(go())


def test_a_source_outside_the_keys_networks_is_refused(controller: RunningController) -> None:
    bundle = controller.operator.create_image_key(ImageKeyTermsWish(networks=["192.0.2.0/24"])).bundle

    async def go() -> None:
        async with machine() as stand:
            with pytest.raises(EnrollError) as refused:
                await stand.se(bundle).enroll()
            assert refused.value.code == "ENROLL-010"

    asyncio.run(go())


def test_a_lost_answer_gets_the_same_grant_again_and_counts_once(controller: RunningController) -> None:
    async def go() -> tuple[Grant, Grant, str]:
        async with machine() as stand:
            se = stand.se(controller.bundle, "lost-answer")
            first = await se.enroll()
            before = uses(controller)
            again = await se.enroll()
            assert uses(controller) == before
            # Once a hello was confirmed the image key is spent for this SE.
            await se.link()
            assert se.spent
            with pytest.raises(EnrollError) as spent:
                await se.enroll()
            refreshed = await se.refresh()
            assert refreshed.number == first.number
            return first, again, spent.value.code

    first, again, spent = asyncio.run(go())
    assert (first.number, first.address) == (again.number, again.address)
    assert spent == "ENROLL-011"


def uses(controller: RunningController) -> int:
    keys = {key.image_key_id: key for key in controller.operator.image_keys()}
    return keys[controller.bundle.image_key_id].uses


def test_one_se_id_with_two_keys_and_one_key_with_two_se_ids_are_refused(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "original")
            await se.enroll()
            twin = stand.se(controller.bundle)
            twin.se_id = se.se_id
            with pytest.raises(EnrollError) as conflict:
                await twin.enroll()
            assert conflict.value.code == "ENROLL-012"
            copy = stand.se(controller.bundle)
            copy.identity = se.identity
            with pytest.raises(EnrollError) as cloned:
                await copy.enroll()
            assert cloned.value.code == "ENROLL-013"
            # The existing SE was not touched.
            await se.link()
            await se.beat()

    asyncio.run(go())
    actions = [entry.action for entry in controller.operator.audit()]
    assert actions.count("enroll.refused") >= 2


@pytest.mark.parametrize(("verb", "wanted"), [("revoke", "ENROLL-014"), ("delete", "ENROLL-017")])
def test_an_ended_se_gets_nothing_more(controller: RunningController, verb: str, wanted: str) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, f"to-{verb}")
            await se.enroll()
            await se.link()
            conn = se.conn
            assert conn is not None
            yes = ["--yes"] if verb == "delete" else []
            await asyncio.to_thread(controller.command, "se", verb, se.se_id, "--reason", "test", *yes)
            await asyncio.wait_for(conn.wait_closed(), 2.0)
            for attempt in (se.enroll, se.refresh):
                with pytest.raises(EnrollError) as refused:
                    await attempt()
                assert refused.value.code == wanted
            with pytest.raises(Exception, match="Permission denied"):
                await se.connect()

    asyncio.run(go())


def test_bodies_and_headers_over_the_limit_are_refused(controller: RunningController) -> None:
    context = tls.client_context([controller.bundle.root_ca])

    def answer(request: bytes) -> bytes:
        with (
            socket.create_connection(("127.0.0.1", controller.enroll_port), timeout=10) as plain,
            context.wrap_socket(plain) as secure,
        ):
            secure.sendall(request)
            return secure.recv(4096)

    post = b"POST /v1/enroll HTTP/1.1\r\nHost: x\r\n"
    assert b" 413 " in answer(post + b"Content-Length: 99999999\r\n\r\n").split(b"\r\n")[0]
    assert b" 431 " in answer(post + b"X-Filler: " + b"a" * 12000 + b"\r\n\r\n").split(b"\r\n")[0]
    assert b" 400 " in answer(b"garbage\r\n\r\n").split(b"\r\n")[0]
    assert b" 404 " in answer(b"GET /v1/ses HTTP/1.1\r\nHost: x\r\n\r\n").split(b"\r\n")[0]


def test_only_tls_1_3_is_spoken(controller: RunningController) -> None:
    context = tls.client_context([controller.bundle.root_ca])
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", controller.enroll_port), timeout=10) as plain,
        pytest.raises(ssl.SSLError),
    ):
        context.wrap_socket(plain)


def test_hundreds_of_silent_and_garbage_clients_do_not_delay_an_enrollment(controller: RunningController) -> None:
    silent = [socket.create_connection(("127.0.0.1", controller.enroll_port)) for _ in range(200)]
    silent += [socket.create_connection(("127.0.0.1", controller.ssh_port)) for _ in range(200)]
    try:
        for index, sock in enumerate(silent):
            if index % 2:
                sock.sendall(b"\x16\x03garbage\r\n")

        async def go() -> float:
            async with machine() as stand:
                se = stand.se(controller.bundle, "through-the-noise")
                began = time.monotonic()
                await se.enroll()
                await link_in_turn(se)
                await se.beat()
                return time.monotonic() - began

        assert asyncio.run(go()) < 5
    finally:
        for sock in silent:
            sock.close()


def test_a_wrong_root_is_refused_by_the_se_and_told_by_why(controller: RunningController, tmp_path: Path) -> None:
    with running(tmp_path / "other") as other:

        async def go() -> None:
            async with machine() as stand:
                se = stand.se(msgspec.structs.replace(other.bundle, controllers=controller.bundle.controllers))
                with pytest.raises(ssl.SSLCertVerificationError):
                    await se.enroll()

        asyncio.run(go())
    chain = until(lambda: failed_tls(controller), what="why names the handshake")
    assert "TLS handshake failed" in chain


def failed_tls(controller: RunningController) -> str:
    verdict = controller.operator.why("127.0.0.1").verdict
    return verdict if "TLS" in verdict else ""


def test_a_grant_survives_kill_9_right_after_it_was_given(tmp_path: Path) -> None:
    with running(tmp_path / "root") as controller:

        async def enroll_some() -> list[tuple[SimulatedSe, Grant]]:
            async with machine() as stand:
                ses = [stand.se(controller.bundle, f"k{index}") for index in range(10)]
                return [(se, await se.enroll()) for se in ses]

        granted = asyncio.run(enroll_some())
        controller.kill()
        controller.start()
        numbers = {summary.se_id: summary.number for summary in controller.operator.ses()}
        assert numbers == {se.se_id: grant.number for se, grant in granted}
        assert controller.operator.verify_audit().intact

        async def next_number() -> int:
            async with machine() as stand:
                return (await stand.se(controller.bundle).enroll()).number

        assert asyncio.run(next_number()) == 11


def test_a_used_nonce_is_remembered_across_a_restart(tmp_path: Path) -> None:
    with running(tmp_path / "root") as controller:
        kept: list[bytes] = []

        async def go() -> None:
            async with machine() as stand:
                se = stand.se(controller.bundle)

                def make(nonce: str) -> bytes:
                    kept.append(se.signed_enrollment(nonce))
                    return kept[0]

                assert (await se.ask(enroll.ENROLL_PATH, make)).status == 201

        asyncio.run(go())
        controller.kill()
        controller.start()

        async def replay() -> Answer:
            async with machine() as stand:
                return await stand.se(controller.bundle).ask(enroll.ENROLL_PATH, lambda _nonce: kept[0])

        assert code(asyncio.run(replay())) == "ENROLL-006"


def test_the_node_certificate_is_renewed_on_the_live_listener(tmp_path: Path) -> None:
    from appliance.controller.material import Files, Material

    with running(tmp_path / "root") as controller:

        async def go() -> None:
            async with machine() as stand:
                se = stand.se(controller.bundle)
                await se.enroll()
                await se.link()
                before = serial(controller)
                # Two thirds of this one's life are over.
                loaded = Material(Files(controller.paths.controller_state))
                old = loaded.authority.issue_node(
                    node=1, addresses=["127.0.0.1"], now=int(time.time()) - 20 * 3600, days=1
                )
                loaded.files.node_key.write_bytes(old.key.reveal())
                loaded.files.node_certificate.write_bytes(old.certificate_pem)
                controller.signal(signal.SIGHUP)
                renewed = until(lambda: (now := serial(controller)) != before and now, what="a new certificate")
                assert renewed
                assert controller.operator.controller().node_certificate_expires_at > time.time() + 80 * 86400
                await se.beat()

        asyncio.run(go())


def serial(controller: RunningController) -> bytes:
    context = tls.client_context([controller.bundle.root_ca])
    with (
        socket.create_connection(("127.0.0.1", controller.enroll_port), timeout=10) as plain,
        context.wrap_socket(plain) as secure,
    ):
        return secure.getpeercert(binary_form=True) or b""


def test_signatures_are_looked_at_before_the_nonce(controller: RunningController) -> None:
    """A stranger without an image key can't burn nonces or learn about freshness."""
    stranger = Identity.create()

    def make(_nonce: str, se: SimulatedSe) -> bytes:
        signers = [("image", se.bundle.image_key_id, stranger), ("se", se.identity.thumbprint, se.identity)]
        payload = jws.parse(se.signed_enrollment("A" * 54), types=("image", "se")).payload
        return signatures.sign(payload, signers)

    assert code(send(controller, enroll.ENROLL_PATH, make)) == "ENROLL-003"
