"""Who has a key and wants more: revoked SEs, SEs of another cluster, and log-ins that other SSH servers would take.

Forged enrollments are in `test_enroll_controller`, tokens and approval in `test_admission_controller`, what a link may
not open in `test_tunnel_controller`, links at bad moments in `test_link_races`. Each test fails when its defence is
taken out.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import msgspec
import psutil
import pytest
from rig import RunningController, core_limit, leaves_core, linked, machine, running, until_async

from appliance.errors import EnrollError, TrustError, UnreachableError
from appliance.lab.simulated import SimulatedSe
from appliance.pki.identity import Identity
from appliance.protocol import enroll, tunnel
from appliance.protocol.enroll import Grant
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.protocol.problem import Problem
from appliance.protocol.why import Step, StepResult

CHANNELS = 10_000


# Enrolling.


def test_one_se_id_with_two_keys_at_once_serves_one(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            rivals = [stand.se(controller.bundle, "contested") for _ in range(10)]
            for rival in rivals:
                rival.se_id = rivals[0].se_id
            outcomes = await asyncio.gather(*(rival.enroll() for rival in rivals), return_exceptions=True)
            (winner,) = [rival for rival, found in zip(rivals, outcomes, strict=True) if isinstance(found, Grant)]
            refused = [found.code for found in outcomes if isinstance(found, EnrollError)]
            assert refused == ["ENROLL-012"] * 9
            detail = controller.operator.se(winner.se_id)
            assert detail.se_key == winner.identity.public_line
            await winner.link()
            for loser in rivals:
                if loser is not winner:
                    loser.grant, loser.trust = winner.grant, winner.trust
                    with pytest.raises(UnreachableError, match="Permission denied"):
                        await loser.connect()

    asyncio.run(go())


def test_an_image_key_revoked_while_many_enroll_lets_nobody_in_afterwards(controller: RunningController) -> None:
    bundle = controller.operator.create_image_key(ImageKeyTermsWish()).bundle

    def came() -> int:
        return next(key.uses for key in controller.operator.image_keys() if key.image_key_id == bundle.image_key_id)

    async def go() -> None:
        async with machine() as stand:
            granted = 0

            async def keep_coming() -> None:
                nonlocal granted
                while True:
                    await stand.se(bundle).enroll()
                    granted += 1

            coming = [asyncio.create_task(keep_coming()) for _ in range(8)]
            await until_async(lambda: came() >= 3, what="the first ones are in")
            answer = await asyncio.to_thread(controller.operator.revoke_image_key, bundle.image_key_id, reason="leaked")
            async with asyncio.timeout(20):
                refused = await asyncio.gather(*coming, return_exceptions=True)
            assert {getattr(error, "code", error) for error in refused} == {"ENROLL-007"}
            # Who got a grant got it before the operator had his answer, which names them all.
            assert granted == len(answer.ses) == came()

    asyncio.run(go())


def test_an_se_revoked_while_it_asks_gets_nothing_afterwards(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "revoked-asking")
            await se.enroll()
            answered: list[float] = []

            async def keep_asking() -> None:
                while True:
                    await se.enroll()
                    answered.append(time.monotonic())

            asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
            await until_async(lambda: len(answered) >= 4, what="it is answered")
            await asyncio.to_thread(controller.operator.revoke_se, "revoked-asking", reason="test")
            revoked_at = time.monotonic()
            async with asyncio.timeout(20):
                outcomes = await asyncio.gather(*asking, return_exceptions=True)
            assert {found.code for found in outcomes if isinstance(found, EnrollError)} == {"ENROLL-014"}
            # What was answered when the operator had his answer may still have been on its way.
            assert not [at for at in answered if at > revoked_at + 2.0]
            with pytest.raises(UnreachableError, match="Permission denied"):
                await se.connect()

    asyncio.run(go())


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[RunningController]:
    """A controller of another cluster."""
    with running(tmp_path / "stranger") as found:
        yield found


def test_nothing_of_one_cluster_is_worth_anything_in_another(
    controller: RunningController, stranger: RunningController
) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = stand.se(controller.bundle, "between-clusters")
            there = stand.se(stranger.bundle, "at-home-there")

            async def code(path: str, body: bytes) -> str:
                answer = await there.ask(path, lambda _nonce: body)
                return msgspec.json.decode(answer.body, type=Problem).code

            # An enrollment and a refresh that the first cluster would take, sent to the second as they are.
            seen: list[bytes] = []

            def remember(nonce: str) -> bytes:
                seen.append(se.signed_enrollment(nonce))
                return seen[-1]

            answer = await se.ask(enroll.ENROLL_PATH, remember)
            se.grant = answer.decode(Grant)
            se.follow(se.grant.trust)
            assert await code(enroll.ENROLL_PATH, seen[0]) == "ENROLL-002"
            assert await code(enroll.REFRESH_PATH, se.signed_refresh("A" * 54)) == "ENROLL-022"
            # The second cluster's image key, but what was signed names the first one, or brings the first one's nonce.
            nonces: list[str] = []
            await se.ask(enroll.REFRESH_PATH, lambda nonce: nonces.append(nonce) or se.signed_refresh(nonce))  # type: ignore[func-returns-value]
            mixed = stand.se(stranger.bundle, "mixed")
            mixed.bundle = msgspec.structs.replace(stranger.bundle, cluster_id=controller.bundle.cluster_id)
            answer = await there.ask(enroll.ENROLL_PATH, mixed.signed_enrollment)
            assert msgspec.json.decode(answer.body, type=Problem).code == "ENROLL-004"
            mixed.bundle = stranger.bundle
            assert await code(enroll.ENROLL_PATH, mixed.signed_enrollment(nonces[0])) == "ENROLL-005"
            # An SE is no member elsewhere, and doesn't talk to a controller that its root didn't sign.
            node = se._node()
            assert node is not None
            se.bundle = msgspec.structs.replace(se.bundle, controllers=stranger.bundle.controllers)
            with pytest.raises((TrustError, OSError), match=r"(?i)certificate"):
                await se.enroll()

    asyncio.run(go())


# Links.


def test_a_revoked_ses_open_link_is_cut_though_it_holds_on(controller: RunningController) -> None:
    """Its own machine doesn't close: it reads nothing, so neither end of file nor a farewell reaches it."""

    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "holds-on")
            conn = se.conn
            assert conn is not None
            transport = conn._transport
            transport.pause_reading()
            before = controller.operator.status().links
            await asyncio.to_thread(controller.operator.revoke_se, "holds-on", reason="test")
            await until_async(lambda: controller.operator.status().links == before - 1, what="cut", deadline_s=2)
            # The key still opens what was open: nothing.
            transport.resume_reading()
            with pytest.raises((asyncssh.Error, OSError, EOFError)):
                await se.beat()
            await asyncio.wait_for(conn.wait_closed(), 2)

    asyncio.run(go())


def test_ten_thousand_channels_cost_others_nothing(controller: RunningController) -> None:
    async def go() -> None:
        async with machine() as stand:
            se = await linked(stand, controller, "greedy")
            other = await linked(stand, controller, "bystander")
            assert controller.process is not None
            memory = psutil.Process(controller.process.pid).memory_info
            before = memory().rss
            slowest = late = 0.0

            async def tick() -> None:
                """How late this process's own loop is, which is no fault of the controller's."""
                nonlocal late
                while True:
                    began = time.monotonic()
                    await asyncio.sleep(0.01)
                    late += max(0.0, time.monotonic() - began - 0.01)

            async def watch() -> None:
                nonlocal slowest
                while True:
                    began, before = time.monotonic(), late
                    try:
                        await other.beat()
                    except EnrollError as error:
                        if error.code != "TUNNEL-045":  # it beats far too often, and is told so as fast
                            raise
                    slowest = max(slowest, time.monotonic() - began - (late - before))

            watching = [asyncio.create_task(work()) for work in (watch, tick)]
            conn = se.conn
            assert conn is not None
            there: list[asyncssh.SSHWriter[bytes]] = []
            refused = most = 0
            for _ in range(CHANNELS // 100):
                # Not all in one go: the client's own loop, which measures, must come to its turn.
                batch = [conn.open_connection(tunnel.CHANNEL_HOST, tunnel.CHANNEL_PORT) for _ in range(100)]
                for found in await asyncio.gather(*batch, return_exceptions=True):
                    if isinstance(found, asyncssh.ChannelOpenError):
                        refused += 1
                    else:
                        assert isinstance(found, tuple), found
                        there.append(found[1])
                # One that asks for nothing is closed after a while, and its place is free again.
                there = [writer for writer in there if not writer.is_closing()]
                most = max(most, len(there))
            for task in watching:
                task.cancel()
            assert most < 64
            assert refused > CHANNELS * 0.9
            assert (memory().rss - before) / 2**20 < 32
            assert slowest < tunnel.DEADLINE_S
            await se.beat()

    asyncio.run(go())


# Logging in.


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningController]:
    """A controller that stock OpenSSH of any age can talk to."""
    root = tmp_path_factory.mktemp("stock") / "root"
    with running(root, settings={"allow_curve25519": True}) as found:
        yield found


def ssh(controller: RunningController, *options: str) -> str:
    """What stock OpenSSH says of a log-in that gets nowhere."""
    line = [
        "ssh", "-F", "none", "-v", "-N", "-p", str(controller.ssh_port), "-o", "BatchMode=yes",
        "-o", "ConnectTimeout=10", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", *options,
        "aviseuser@127.0.0.1",
    ]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 255, done.stderr
    return done.stderr


needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="needs openssh-client")


@needs_ssh
def test_public_keys_are_the_only_way_in(stock: RunningController) -> None:
    said = ssh(stock, "-o", "PreferredAuthentications=none", "-o", "PubkeyAuthentication=no")
    assert "Authentications that can continue: publickey\n" in said
    assert "Permission denied (publickey)." in said


@needs_ssh
@pytest.mark.parametrize("method", ["password", "keyboard-interactive", "hostbased", "gssapi-with-mic"])
def test_other_methods_are_not_taken_up(stock: RunningController, method: str) -> None:
    """Also where the client doesn't wait for an offer."""

    async def go() -> None:
        class Pushy(asyncssh.SSHClient):
            def password_auth_requested(self) -> str:
                return "password"

            def kbdint_auth_requested(self) -> str:
                return ""

            def kbdint_challenge_received(self, *_: object) -> list[str]:
                raise AssertionError("the gateway asked a question")

        with pytest.raises(asyncssh.PermissionDenied):
            await asyncssh.connect(
                "127.0.0.1", stock.ssh_port, username="aviseuser", known_hosts=None, config=None, agent_path=None,
                client_keys=None, client_factory=Pushy, preferred_auth=method,
            )  # fmt: skip

    asyncio.run(go())
    said = ssh(stock, "-o", f"PreferredAuthentications={method}", "-o", "PubkeyAuthentication=no")
    assert "Permission denied (publickey)." in said


@needs_ssh
def test_certificates_and_rsa_are_refused_whoever_signed(stock: RunningController, tmp_path: Path) -> None:
    """An enrolled SE's key, and the cluster's own keys, make no members: nobody's certificate counts."""

    def key(name: str, pem: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(pem)
        path.chmod(0o600)
        return path

    async def go() -> SimulatedSe:
        async with machine() as stand:
            se = stand.se(stock.bundle, "signer")
            await se.enroll()
            # The key itself gets in: what is refused below is refused for its form.
            await se.link()
            return se

    se = asyncio.run(go())
    signers = {
        "enrolled": key("enrolled", se.identity.openssh().reveal()),
        "login": stock.paths.controller_state / "id_se",
        "host": stock.paths.controller_state / "ssh_host_ed25519_key",
    }
    guest = key("guest", Identity.create().openssh().reveal())
    keygen = ["ssh-keygen", "-q"]
    public = tmp_path / "guest.pub"
    with public.open("wb") as file:
        subprocess.run([*keygen, "-y", "-f", str(guest)], check=True, stdout=file, timeout=30)
    for name, signer in signers.items():
        line = [
            *keygen,
            "-s",
            str(signer),
            "-I",
            name,
            "-n",
            "aviseuser",
            "-V",
            "-1d:+1d",
            str(public),
        ]
        subprocess.run(line, check=True, timeout=30)
        said = ssh(
            stock, "-i", str(guest), "-o", f"CertificateFile={tmp_path}/guest-cert.pub", "-o", "IdentitiesOnly=yes"
        )
        assert "ED25519-CERT" in said, name
        assert "Permission denied (publickey)." in said, name
    rsa = tmp_path / "rsa"
    subprocess.run([*keygen, "-t", "rsa", "-b", "2048", "-N", "", "-f", str(rsa)], check=True, timeout=30)
    for algorithms in ("ssh-rsa", "rsa-sha2-256,rsa-sha2-512"):
        said = ssh(stock, "-i", str(rsa), "-o", "IdentitiesOnly=yes", "-o", f"PubkeyAcceptedAlgorithms={algorithms}")
        assert "Permission denied (publickey)." in said

    async def show_all_the_same() -> None:
        """OpenSSH keeps back a key that the gateway's list of algorithms rules out; others don't."""
        with pytest.raises(asyncssh.PermissionDenied):
            await asyncssh.connect(
                "127.0.0.1", stock.ssh_port, username="aviseuser", known_hosts=None, config=None, agent_path=None,
                client_keys=[rsa],
            )  # fmt: skip

    asyncio.run(show_all_the_same())
    link = next(link for link in stock.operator.why("127.0.0.1").steps if link.step is Step.LINK)
    assert (link.result, link.code) == (StepResult.FAILED, "TUNNEL-010")
    assert link.text == "log-in refused: the key is no Ed25519 key"


def test_an_rsa_key_never_becomes_an_ses(controller: RunningController) -> None:
    """The gateway would otherwise have to know SHA-1 from SHA-2, which its library doesn't."""
    line = " ".join(asyncssh.generate_private_key("ssh-rsa", key_size=2048).export_public_key().decode().split()[:2])
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    fingerprint = "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    async def go() -> Problem:
        async with machine() as stand:
            se = stand.se(controller.bundle, "rsa")

            def make(nonce: str) -> bytes:
                wish = msgspec.structs.replace(se._request(nonce), se_key=line)
                from appliance.pki import jws as signatures
                from appliance.protocol import strict_json

                image = Identity.from_pkcs8(se.bundle.image_key.encode())
                signers = [("image", se.bundle.image_key_id, image), ("se", fingerprint, se.identity)]
                return signatures.sign(strict_json.encode(wish), signers)  # type: ignore[arg-type]

            answer = await se.ask(enroll.ENROLL_PATH, make)
            return msgspec.json.decode(answer.body, type=Problem)

    problem = asyncio.run(go())
    assert problem.code == "ENROLL-001"
    assert "SSH key of type 'ssh-rsa'" in problem.detail


# What stays behind.


def test_a_controller_leaves_its_keys_in_no_core_file(tmp_path: Path) -> None:
    plain = subprocess.Popen(
        [sys.executable, "-c", "import signal; print(flush=True); signal.pause()"], cwd=tmp_path, stdout=subprocess.PIPE
    )
    assert plain.stdout is not None
    with plain.stdout as ready:
        ready.readline()
    if not leaves_core(plain):
        pytest.skip("this system writes no core files")
    with running(tmp_path / "root") as controller:
        assert controller.process is not None
        assert core_limit(controller.process.pid) == (0, 0)
        assert not leaves_core(controller.process)
