"""The operator API and metrics of a real controller: what `appliance` commands and outside clients rely on."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import socket
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import msgspec
import pytest
from image_reports import report
from rig import RunningController, machine, running, until_async

from appliance.errors import NotFoundError
from appliance.protocol.enroll import Policy
from appliance.protocol.operator import ImageKeyTermsWish, TokenWish
from appliance.protocol.tunnel import ImageKeyCopies
from appliance.protocol.why import Step, StepResult

AUDITED_ELSEWHERE = {f"/v1/recovery/{verb}" for verb in ("begin", "end", "approve")}
"""They take a restored controller: `test_only_a_true_receipt_of_ones_own_is_taken`."""
NOT_AUDITED = {"/v1/audit/head"}
"""It signs what is there, and changes nothing."""


def ask(controller: RunningController, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """What the operator API answers where it does as asked."""
    connection = http.client.HTTPConnection("controller", timeout=60)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(60)
    connection.sock.connect(str(controller.paths.controller_socket))
    connection.request(method, path, None if body is None else json.dumps(body))
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    assert answer.status in {200, 201}, said
    return json.loads(said)


def test_why_names_the_first_step_that_failed_for_each_kind_of_subject(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "told")
            se.bundle = controller.bundle
            await se.enroll()
            chain = controller.operator.why("told")
            assert chain.verdict.startswith("waiting for link")
            await se.link()
            await se.beat()
            await until_async(lambda: controller.state("told") == "UP OK", what="UP")
            number = str(se.grant.number)
            for subject in ("told", number, se.se_id, se.grant.address, se.attempt_id):
                chain = controller.operator.why(subject)
                assert chain.verdict == "all steps happened"
                assert [link.step for link in chain.steps] == list(Step)
                assert all(link.at > 0 for link in chain.steps if link.result is StepResult.OK)
            assert controller.operator.why("127.0.0.1").verdict == "all steps happened"
            se.close()
            await until_async(lambda: controller.state("told").startswith("DOWN"), what="DOWN")
            assert "stopped at link" in controller.operator.why("told").verdict
            steps = controller.operator.why("127.0.0.1").steps
            assert {link.result for link in steps[list(Step).index(Step.HELLO) :]} == {StepResult.WAITING}
            controller.command("se", "revoke", "told", "--reason", "stolen")
            assert "stolen" in controller.operator.why("told").verdict
        with pytest.raises(NotFoundError):
            controller.operator.why("198.51.100.7")

    asyncio.run(go())


def test_an_image_key_that_an_se_destroyed_is_reported_once(controller: RunningController) -> None:
    action, kind = "enroll.image-key-destroyed", "se.image-key-destroyed"

    def events(name: str) -> list[str]:
        found = [event for event in controller.operator.events() if event.kind.startswith("se.image-key-")]
        return [event.kind for event in found if event.text.startswith(f"{name} ")]

    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "scrubs")
            await se.enroll()
            assert controller.operator.se("scrubs").image_key_gone_at == 0.0
            for _ in range(2):
                await se.link()
                await se.beat()
                await until_async(lambda: controller.operator.se("scrubs").image_key_gone_at > 0, what="it is noted")
                se.close()
                await until_async(lambda: controller.state("scrubs").startswith("DOWN"), what="DOWN")
            await until_async(lambda: events("scrubs"), what="the event")
            assert events("scrubs") == [kind]
            audit = controller.operator.audit()
            (entry,) = [one for one in audit if (one.action, one.subject) == (action, se.se_id)]
            assert controller.bundle.image_key_id in entry.detail
            assert "destroyed its copies of the image key" in controller.operator.why("scrubs").steps[4].text
            assert "its copies destroyed" in controller.command("se", "show", "scrubs").stdout

            keeps = stand.se(controller.bundle, "keeps")
            await keeps.enroll()
            await keeps.link()
            keeps.image_key = ImageKeyCopies.LEFT
            await keeps.beat()
            await until_async(lambda: events("keeps"), what="the event")
            assert events("keeps") == ["se.image-key-left"]
            assert controller.operator.se("keeps").image_key_gone_at == 0.0
            assert "not told that it was destroyed" in controller.command("se", "show", "keeps").stdout

    asyncio.run(go())


def test_commands_speak_json_and_exit_codes(controller: RunningController) -> None:
    for args in (("status",), ("se", "list"), ("image-key", "list"), ("audit", "verify"), ("controller", "show")):
        json.loads(controller.command(*args, "--json").stdout)
    assert json.loads(controller.command("audit", "verify", "--json").stdout)["intact"] is True
    missing = controller.command("se", "show", "nobody", check=False)
    assert missing.returncode == 10
    assert "appliance se list" in missing.stderr
    again = controller.command("controller", "init", "--address", "127.0.0.1", "--date", "now", check=False)
    assert again.returncode == 4


def test_metrics_are_on_loopback_and_read_only(controller: RunningController) -> None:
    port = controller.bound["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert "appliance_build_info" in text
    assert "appliance_audit_entries_total" in text
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/ses", method="GET")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(request, timeout=10)


def test_the_operator_socket_is_closed_to_others(controller: RunningController) -> None:
    assert controller.paths.controller_socket.stat().st_mode & 0o777 == 0o660


def test_who_did_it_is_in_the_audit(controller: RunningController) -> None:
    controller.command("image-key", "create", "--note", "audited", "--out", str(controller.root / "k.json"))
    entry = controller.operator.audit()[-1]
    assert entry.action == "image-key.created"
    assert f"uid {os.geteuid()}" in entry.actor


def test_every_act_of_an_operator_is_in_the_audit(tmp_path: Path) -> None:
    """A new POST fails here until somebody says which entry it writes, or why none."""
    with running(tmp_path / "root") as controller:
        operator = controller.operator
        bundle = operator.create_image_key(ImageKeyTermsWish(policy=Policy.APPROVE)).bundle
        key = bundle.image_key_id
        token = operator.create_token(TokenWish(image_key_id=key)).view.token_id

        async def ask_in() -> None:
            async with machine() as stand:
                for name in ("let-in", "turned-away"):
                    await stand.se(bundle, name).ask_in()

        asyncio.run(ask_in())
        image = report(cluster_id=bundle.cluster_id, image_key_id=key)
        old, new = "five random words or more", "five other words or more"
        acts: list[tuple[str, str, dict[str, Any] | None, str]] = [
            ("/v1/tokens", "", {"image_key_id": key}, "token.created"),
            ("/v1/tokens/{token}/revoke", token, {}, "token.revoked"),
            ("/v1/ses/{se}/reject", "turned-away", {}, "se.rejected"),
            ("/v1/ses/{se}/approve", "let-in", {}, "se.approved"),
            ("/v1/ses/{se}/rotate-key", "let-in", {}, "se.key-due"),
            ("/v1/ses/{se}/release", "let-in", {}, "se.released"),
            ("/v1/ses/{se}/revoke", "let-in", {}, "se.revoked"),
            ("/v1/ses/{se}/reinstate", "let-in", {}, "se.reinstated"),
            ("/v1/ses/{se}/delete", "let-in", {}, "se.deleted"),
            ("/v1/images", "", msgspec.to_builtins(image), "image.added"),
            ("/v1/images/{image}/revoke", image.image_id, {"key": "keep"}, "image.revoked"),
            ("/v1/image-keys", "", {}, "image-key.created"),
            ("/v1/image-keys/{key}/revoke", key, {}, "image-key.revoked"),
            ("/v1/rotations/{kind}/begin", "login-key", {}, "trust.login-key.begin"),
            ("/v1/rotations/{kind}/abort", "login-key", {}, "trust.login-key.abort"),
            ("/v1/rotations/{kind}/begin", "host-key", {}, "trust.host-key.begin"),
            ("/v1/rotations/{kind}/finish", "host-key", {"force": True}, "trust.host-key.finish"),
            ("/v1/rotations/{kind}/forget", "ca", {}, "trust.ca.forget"),
            ("/v1/passphrase/set", "", {"new": old}, "passphrase.set"),
            ("/v1/passphrase/change", "", {"passphrase": old, "new": new}, "passphrase.changed"),
            ("/v1/issuing-ca/renew", "", {"passphrase": new}, "issuing-ca.renewed"),
            ("/v1/passphrase/remove", "", {"passphrase": new, "force": True}, "passphrase.removed"),
            ("/v1/drain", "", None, "controller.drained"),
        ]
        paths = ask(controller, "GET", "/v1/openapi.json")["paths"]
        decided = {path for path, *_ in acts} | AUDITED_ELSEWHERE | NOT_AUDITED
        assert decided == {path for path, item in paths.items() if "post" in item}
        newest = operator.audit()[-1].sequence
        for path in NOT_AUDITED:
            ask(controller, "POST", path)
        me = f"(uid {os.geteuid()}, process {os.getpid()})"
        for path, part, body, action in acts:
            ask(controller, "POST", re.sub(r"{\w+}", part, path), body)
            (entry,) = operator.audit(after=newest)
            assert entry.action == action, path
            assert me in entry.actor, path
            newest = entry.sequence


def test_no_secret_is_told_anywhere(controller: RunningController) -> None:
    """Private keys stand in their own 0600 files and nowhere else: not in logs, the store, the process list."""
    state = controller.paths.controller_state
    secrets = {
        "image key": controller.bundle.image_key.splitlines()[1],
        "root key": (state / "root-ca.key").read_text().splitlines()[1],
        "login key": (state / "id_se").read_text().splitlines()[2],
        "nonce key": (state / "nonce.key").read_bytes().hex(),
    }
    for path in state.rglob("*"):
        if path.suffix not in {".pub", ".pem"} and path.is_file():
            mode = path.stat().st_mode & 0o777
            holds = [name for name, secret in secrets.items() if secret.encode() in path.read_bytes()]
            assert not holds or mode == 0o600, f"{path} ({mode:o}) holds {holds}"
    places = {
        "log": controller.log.read_text(),
        "store": (state / "store.sqlite").read_bytes().decode("latin1"),
        "processes": subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout,
        "audit": controller.command("audit", "show", "--json").stdout,
    }
    for place, text in places.items():
        assert not [name for name, secret in secrets.items() if secret in text], place


def test_events_can_be_followed(controller: RunningController) -> None:
    last = controller.operator.events()[-1].id

    async def go() -> None:
        async with machine() as stand:
            waiting = asyncio.create_task(asyncio.to_thread(controller.operator.events, after=last, wait_s=10))
            await stand.se(controller.bundle, "followed").enroll()
            assert (await waiting)[0].kind == "enroll.granted"

    asyncio.run(go())


def test_the_openapi_document_keeps_unknown_fields_out(controller: RunningController) -> None:
    document = ask(controller, "GET", "/v1/openapi.json")
    assert document["openapi"] == "3.1.0"
    assert document["components"]["schemas"]["Reasoned"]["additionalProperties"] is False


def test_private_files_are_private(controller: RunningController) -> None:
    wanted = {"root-ca.key": 0o600, "node.key": 0o600, "id_se": 0o600, "nonce.key": 0o600, "store.sqlite": 0o600}
    for name, mode in wanted.items():
        path: Path = controller.paths.controller_state / name
        assert path.stat().st_mode & 0o777 == mode, name
