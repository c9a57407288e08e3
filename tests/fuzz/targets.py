"""Everything that reads foreign bytes, each as one function of bytes: True where it read them, False where it refused.

A target holds when it returns; any error that isn't the reader's own is a defect, whatever the bytes. Some say more:
what is read and written again stays the same, what nobody signed is never believed. `test_targets` asks them with
hypothesis in every run; `scripts/fuzz` drives the same functions by coverage, for as long as one likes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import http.client
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import good
from starlette.requests import Request
from starlette.responses import Response

from appliance import settings
from appliance.cli import audit as cli_audit
from appliance.cli.context import CliContext
from appliance.controller import enroll as door
from appliance.controller import records
from appliance.controller.listener import FrontEnd, HttpLimits
from appliance.controller.nonce import Nonces
from appliance.controller.web import Endpoint, application
from appliance.errors import (
    ApplianceError,
    DocumentBrokenError,
    EnrollError,
    ImageError,
    SeedError,
    SettingsError,
    StorageError,
    StoreError,
    TelemetryError,
    TrustError,
    TunnelError,
    UnreachableError,
    UsageError,
)
from appliance.machine import gpt, wishes
from appliance.machine.fat import Fat
from appliance.machine.iso import Iso
from appliance.paths import Paths
from appliance.pki import certificate, sealed, ssh_keys
from appliance.pki import jws as signatures
from appliance.pki.trust import verify_audit_head, verify_receipt, verify_trust
from appliance.protocol import address, audit, enroll, jws, ovf, strict_json, telemetry, token, tunnel
from appliance.protocol import seed as seeds
from appliance.protocol.image import MAX_CHARS, MAX_REPORT_BYTES, ImageReport, check_report
from appliance.protocol.operator import AuditEntry
from appliance.protocol.strict_json import MalformedError
from appliance.protocol.trust import (
    AUDIT_HEAD_TYPE,
    RECEIPT_TYPE,
    TRUST_TYPE,
    Envelope,
    TrustAnswer,
    TrustDocument,
    TrustRequest,
)
from appliance.runtime.clock import SystemClock
from appliance.runtime.health import read_health
from appliance.runtime.mode import document_of
from appliance.runtime.stop import StopToken
from appliance.se import seed as se_seed
from appliance.se.believed import Beliefs
from appliance.se.channel_api import AnswerReader
from appliance.se.channel_api import decode as decode_answer
from appliance.se.enroll import Awaiting, Refused
from appliance.se.first_boot import Enrollment
from appliance.se.https import Conversation, _Timed
from appliance.se.identity import IdentityRecord, SeState
from appliance.storage.document import Document
from appliance.storage.spool import Spool
from image_builder import ova_lint, recipe
from image_builder import seed as baking

MAX_BYTES = 1 << 20


class Target(NamedTuple):
    """One reader."""

    run: Callable[[bytes], bool]
    good: Callable[[], list[bytes]]
    """What it reads, to start from."""


def text(raw: bytes) -> str:
    """Bytes as any text, also such as no UTF-8 gives."""
    return raw.decode("utf-8", "surrogateescape")


def pieces(raw: bytes) -> list[bytes]:
    """What a network might make of it; the first byte says how large a piece is."""
    size = 1 + raw[0] if raw else 1
    return [raw[start : start + size] for start in range(0, len(raw), size)]


# What strangers send to 8443.


def run_enrollment(raw: bytes) -> bool:
    try:
        wish = strict_json.decode(raw, enroll.EnrollRequest, max_bytes=enroll.MAX_REQUEST_BYTES)
        door.check_request(wish)
    except MalformedError:
        return False
    assert strict_json.decode(strict_json.encode(wish), enroll.EnrollRequest, max_bytes=MAX_BYTES) == wish
    return True


def run_jws(raw: bytes) -> bool:
    read = False
    for types in (("image", "se"), ("se",)):
        try:
            found = jws.parse(raw, types=types)  # type: ignore[arg-type]
        except MalformedError:
            continue
        read = True
        for entry, line in zip(
            found.signatures, (good.image_key()[1].public_line, good.identity().public_line), strict=False
        ):
            if signatures.verify(entry, line):
                assert found.payload == good.enrollment(), "a payload is believed that nobody signed"
    return read


def run_refresh(raw: bytes) -> bool:
    """With the receipt that an SE shows to a restored controller."""
    try:
        wish = strict_json.decode(raw, enroll.RefreshRequest, max_bytes=enroll.MAX_REQUEST_BYTES)
        if wish.claim is not None:
            door.check_claim(wish, wish.claim)
    except MalformedError:
        return False
    assert strict_json.decode(strict_json.encode(wish), enroll.RefreshRequest, max_bytes=MAX_BYTES) == wish
    return True


def run_nonce(raw: bytes) -> bool:
    return Nonces(b"k" * 32).is_fresh(text(raw), good.NOW)


def run_token(raw: bytes) -> bool:
    try:
        token.parse(text(raw))
    except UsageError as error:
        said = str(error)
    else:
        return True
    assert len(raw) < 20 or text(raw) not in said, "a secret is repeated"
    return False


class _Wire(asyncio.Transport):
    """The other end of a front end's connection."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.written = b""

    def write(self, content: Any) -> None:
        assert not self.closed, "written after closing"
        self.written += bytes(content)

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, _name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def _take(_request: Request, body: bytes) -> Response:
    assert len(body) <= 2048, "a body over its limit"
    return Response(b"taken")


@functools.cache
def _application() -> Any:
    return application("fuzz", [Endpoint("POST", "/v1/enroll", _take, "", {200: None}, bytes)], max_body=2048)


def run_http(raw: bytes) -> bool:
    """The guarded protocol object of every front end: it answers or closes, and keeps within its limits."""

    async def go() -> bool:
        failed: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failed.append(str(context)))
        front = FrontEnd(_application(), HttpLimits(1024, 2048, 5.0, 5.0, 5, 16))
        wire, protocol = _Wire(), front.protocol(source="192.0.2.1")
        protocol.connection_made(wire)
        for piece in pieces(raw):
            protocol.data_received(piece)
            await asyncio.sleep(0)
        if tasks := front.server_state.tasks:
            await asyncio.wait(list(tasks), timeout=0.01)
        protocol.connection_lost(None)
        if tasks := front.server_state.tasks:
            await asyncio.wait(list(tasks), timeout=5)
        assert not failed, failed
        return b"taken" in wire.written

    return asyncio.run(go())


# What SEs send over their links.


def run_telemetry(raw: bytes) -> bool:
    """As an SE's text, and as what such a text unpacks to."""
    packing = zlib.compressobj(zdict=telemetry.dictionary())
    packed = base64.b64encode(packing.compress(raw) + packing.flush()).decode()
    read = False
    for said in (text(raw), packed):
        try:
            found = telemetry.decode(said)
        except TelemetryError:
            continue
        assert telemetry.decode(telemetry.encode(found)) == found
        read = True
    return read


def run_channel_request(raw: bytes) -> bool:
    read = False
    for kind in (tunnel.Hello, tunnel.Confirm, tunnel.Heartbeat, tunnel.RotateKey):
        try:
            found: Any = strict_json.decode(raw, kind, max_bytes=tunnel.MAX_BODY_BYTES)
        except MalformedError:
            continue
        assert strict_json.decode(strict_json.encode(found), kind, max_bytes=MAX_BYTES) == found
        read = True
    return read


def run_host_key_probe(raw: bytes) -> bool:
    """As an SE's sshd sends it to the controller that checks the reverse path."""
    probe = good.probe()
    with contextlib.suppress(TrustError):
        for piece in pieces(raw):
            probe.feed(piece)
    assert probe.host_key in {None, good.identity().public_line}, "a host key is believed that nobody proved"
    return probe.host_key is not None


# What controllers, or who says to be one, send to SEs.


def run_channel_answer(raw: bytes) -> bool:
    reader, read = AnswerReader(), False
    try:
        for piece in pieces(raw):
            reader.feed(piece)
            while (answer := reader.next()) is not None:
                decode_answer(answer, tunnel.HeartbeatAnswer, tunnel.HEARTBEAT_PATH)
                read = True
    except TunnelError:
        return False
    return read


class _Said:
    """A connected socket whose other end said something and hung up."""

    def __init__(self, raw: bytes) -> None:
        self._rest = raw

    def settimeout(self, _timeout_s: float | None) -> None: ...

    def send(self, content: Any) -> int:
        return len(content)

    def recv_into(self, buffer: memoryview) -> int:
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None: ...


def _trust() -> TrustDocument:
    return strict_json.decode(good.trust_document(), TrustDocument, max_bytes=MAX_BYTES)


@functools.cache
def _first_boot() -> Enrollment:
    """An SE that has a key and a seed's trust, and asks for its grant."""
    paths, clock = Paths(good.emptied("first-boot")), SystemClock()
    state = SeState(paths)
    key = good.identity().pkcs8().reveal().decode()
    record = IdentityRecord(se_id=good.SE_ID, key=key, attempt_id="0" * 16)
    Document(state.directory / "identity.json", IdentityRecord).save(record)
    state.load()
    beliefs = Beliefs(state.trust_document, authorized_keys=state.authorized_keys_path)
    beliefs.start_from_seed(good.envelope(), _trust())
    return Enrollment(
        paths, settings.Se(), state=state, beliefs=beliefs, clock=clock, tell=lambda *_: None, tell_line=lambda _: None
    )


def _ask_nonce(there: Conversation) -> None:
    answer = there.post(enroll.NONCE_PATH, b"", attempt_id="0" * 16)
    strict_json.decode(answer.body, enroll.NonceAnswer, max_bytes=MAX_BYTES)


def _ask_grant(there: Conversation) -> None:
    se = _first_boot()
    se._conversation, se._grant = there, None
    told = se._ask(enroll.REFRESH_PATH, se._refresh_request("n"), by_image_key=False)
    if isinstance(told, Awaiting | Refused):
        assert 0 <= told.retry_after_s <= se._settings.retry_most_s, "a controller parks an SE"
    else:
        assert se._grant is not None
        signed = (se._grant.trust.body(), se._grant.receipt.body())
        assert signed == (good.trust_document(), good.receipt()), "believed, and nobody signed it"


def run_https_answer(raw: bytes) -> bool:
    """As first boot reads it: a nonce; then a grant, the word to wait, or a refusal."""
    read = False
    for ask in (_ask_nonce, _ask_grant):
        clock, said = SystemClock(), _Said(raw)
        there = Conversation("192.0.2.1:8443", trust=_trust(), clock=clock, connect_timeout_s=1.0, stop=StopToken())
        # As after a handshake.
        there._sock = said  # type: ignore[assignment]
        there._timed = _Timed(said, clock)  # type: ignore[arg-type]
        there._http = http.client.HTTPConnection("controller")
        there._http.auto_open = 0
        there._http.sock = there._timed  # type: ignore[assignment]
        with (
            contextlib.closing(there._http),
            contextlib.suppress(UnreachableError, MalformedError, TrustError, EnrollError),
        ):
            ask(there)
            read = True
    return read


def _as_envelope(raw: bytes, verify: Callable[[Envelope], Any]) -> Any:
    try:
        return verify(strict_json.decode(raw, Envelope, max_bytes=MAX_BYTES))
    except (TrustError, MalformedError):
        return None


def _as_body(raw: bytes, kind: str, verify: Callable[[Envelope], Any]) -> Any:
    """What a root signed with its eyes shut."""
    try:
        return verify(good.authority().sign(kind, raw))
    except (TrustError, MalformedError):
        return None


def run_trust(raw: bytes) -> bool:
    verify = functools.partial(verify_trust, anchors=good.anchors(), current=None)
    found = _as_envelope(raw, verify)
    with contextlib.suppress(TrustError, MalformedError):
        found = found or verify(strict_json.decode(raw, TrustAnswer, max_bytes=MAX_BYTES).trust)
    assert found is None or strict_json.encode(found) == good.trust_document(), "believed, and nobody signed it"
    if found is None and _as_body(raw, TRUST_TYPE, verify) is None:
        with contextlib.suppress(MalformedError):
            return strict_json.decode(raw, TrustRequest, max_bytes=MAX_BYTES) is not None
        return False
    return True


def run_receipt(raw: bytes) -> bool:
    read = False
    for kind, verify in ((RECEIPT_TYPE, verify_receipt), (AUDIT_HEAD_TYPE, verify_audit_head)):
        check: Any = functools.partial(verify, anchors=good.anchors())
        assert _as_envelope(raw, check) is None, "believed, and nobody signed it"
        read |= _as_body(raw, kind, check) is not None
    return read


# Keys, certificates, sealed files.


def run_certificate(raw: bytes) -> bool:
    """As a certificate to look at, and as the anchor that is to verify something."""
    read = False
    with contextlib.suppress(TrustError):
        verify_trust(good.envelope(), anchors=[raw.decode("latin-1")], current=None)
        read = True
    with contextlib.suppress(TrustError):
        certificate.all_of(raw)
    for load in (certificate.load_pem, certificate.load_der):
        try:
            certificate.terms_of(load(raw))
            read = True
        except TrustError:
            continue
    return read


def run_public_key(raw: bytes) -> bool:
    try:
        found = ssh_keys.parse_public(text(raw))
    except TrustError:
        return False
    assert ssh_keys.public_line(found) == text(raw), "two lines mean one key"
    return True


def run_private_key(raw: bytes) -> bool:
    try:
        ssh_keys.load_private(raw)
    except TrustError:
        return False
    return True


def run_backup(raw: bytes) -> bool:
    try:
        sealed.open_sealed(raw, good.PASSPHRASE, magic=good.BACKUP_MAGIC)
    except TrustError:
        return False
    assert raw == good.backup(), "opened, and nobody sealed it"
    return True


# What images, disks and operators bring.


def run_bundle(raw: bytes) -> bool:
    try:
        baked = baking.bake(raw, baking.Wishes(), baked_at=good.NOW, now=good.NOW)
    except SeedError as error:
        said = str(error)
    else:
        keys = [file.name for file in baked.files if b"PRIVATE KEY" in file.content]
        assert keys == [seeds.IMAGE_KEY_FILE], "a private key in a file that isn't the image key's"
        return True
    assert good.image_key()[1].pkcs8().reveal().splitlines()[1].decode() not in said, "a key is repeated"
    return False


def run_image_report(raw: bytes) -> bool:
    try:
        found = strict_json.decode(raw, ImageReport, max_bytes=MAX_REPORT_BYTES)
    except MalformedError:
        return False
    if check_report(found):
        return False
    shown = (found.name, found.system, *found.files, *found.files.values(), *found.ids)
    assert all(0 < len(text) <= MAX_CHARS for text in shown if text)
    assert "\x1b" not in "".join(shown), "it would drive a terminal"
    assert strict_json.decode(strict_json.encode(found), ImageReport, max_bytes=MAX_REPORT_BYTES) == found
    return True


def run_seed(raw: bytes) -> bool:
    """One file of a good seed is another one: the first byte says which."""
    files = good.seed_files()
    if raw:
        files[good.SEED_NAMES[raw[0] % len(good.SEED_NAMES)]] = raw[1:]
    root = good.emptied("seed")
    try:
        found = se_seed.load(Paths(root), setting=str(root), given=files)
    except SeedError:
        return False
    assert strict_json.encode(found.document) == good.trust_document()
    return True


def run_iso(raw: bytes) -> bool:
    path = good.emptied("iso") / "seed.iso"
    path.write_bytes(raw)
    try:
        se_seed.read_files(path)
    except SeedError:
        return False
    return True


def run_attached_disk(raw: bytes) -> bool:
    """What somebody attached to a VM, as first boot reads it: ISO, then FAT."""

    def read(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert 0 <= length <= 1 << 17
        return raw[offset : offset + length]

    found = False
    for kind in (Iso, Fat):
        with contextlib.suppress(SeedError):
            files = kind(read).files([*good.SEED_NAMES, "network-config"], max_bytes=1 << 16)
            assert all(len(content) <= 1 << 16 for content in files.values())
            found = True
    return found


def run_partition_table(raw: bytes) -> bool:
    """The first byte says how much of it is the second copy's."""
    cut = len(raw) * (raw[0] if raw else 0) // 255
    try:
        table = gpt.read(raw[1 : len(raw) - cut], raw[len(raw) - cut :], sectors=8192)
    except SeedError:
        return False
    change = gpt.without(table, 3, grow=2, sectors=8192)
    assert gpt.read(change.first, change.second, sectors=8192).entries[256:384] == bytes(128)
    return True


def run_network_config(raw: bytes) -> bool:
    try:
        checked = wishes.checked_network(raw)
    except ValueError:
        return False
    assert wishes.checked_network(checked) == checked
    return True


def run_ovf(raw: bytes) -> bool:
    try:
        found = ovf.parse_environment(raw)
    except SeedError:
        return False
    told, problems = ovf.read_properties(found)
    assert not told.token or told.token not in "".join(problems), "a secret is repeated"
    return bool(found)


def run_settings(raw: bytes) -> bool:
    paths = Paths(good.emptied("settings"))
    paths.settings_file.parent.mkdir(parents=True)
    paths.settings_file.write_bytes(raw)
    try:
        settings.load(paths, environ={}, overrides={})
    except SettingsError:
        return False
    return True


def run_endpoint(raw: bytes) -> bool:
    try:
        host, port = address.parse_endpoint(text(raw), default_port=8443)
    except UsageError:
        return False
    assert address.parse_endpoint(address.format_endpoint(host, port), default_port=1) == (host, port)
    return True


# What a power cut, or another hand, left on disk.


def run_document(raw: bytes) -> bool:
    paths = Paths(good.emptied("document"))
    document, file = document_of(paths), paths.mode_file
    file.parent.mkdir(parents=True)
    file.write_bytes(raw)
    try:
        document.load()
    except DocumentBrokenError:
        assert not file.exists(), "what is broken stays in its place"
        assert [kept.read_bytes() for kept in file.parent.iterdir()] == [raw], "what is broken isn't kept"
        return False
    except StorageError:
        assert file.read_bytes() == raw
        return False
    return True


def run_spool(raw: bytes) -> bool:
    """A segment of any content behind a good record, or in its place: the spool opens and goes on."""
    path = good.emptied("spool")
    spool = Spool(path, max_bytes=1 << 16)
    spool.append(b"first")
    spool.close()
    (segment,) = path.iterdir()
    is_behind = raw[:1] == b"+"
    segment.write_bytes((segment.read_bytes() if is_behind else b"") + raw[1:])
    spool = Spool(path, max_bytes=1 << 16)
    try:
        read = [item for _, item in spool.peek(1000)][:1] == [b"first"]
        spool.append(b"last")
        assert [item for _, item in spool.peek(10_000)][-1] == b"last"
    finally:
        spool.close()
    return read


def run_health(raw: bytes) -> bool:
    path = good.emptied("health") / "health.json"
    path.write_bytes(raw)
    return read_health(path) is not None


def run_record(raw: bytes) -> bool:
    read = False
    for kind in (records.SeRecord, records.ImageKeyRecord, records.TokenRecord):
        try:
            records.decode(raw, kind, "key")
            read = True
        except StoreError:
            continue
    return read


def run_audit(raw: bytes) -> bool:
    try:
        entries = strict_json.decode(raw, list[AuditEntry], max_bytes=MAX_BYTES)
    except MalformedError:
        return False
    verdict = audit.verify(entries, start=audit.genesis(good.CLUSTER, 1, 1))
    assert verdict.entries <= len(entries)
    return verdict.intact


def run_audit_file(raw: bytes) -> bool:
    """What `appliance audit verify --file` is given: an export or a copied store; and a witness beside it."""
    path = good.emptied("audit") / "copy"
    path.write_bytes(raw)
    read = False
    context = CliContext(Paths(path.parent), {}, json=False)
    for parse in (lambda: cli_audit._verify_file(context, path, "", "", None), lambda: cli_audit._envelopes(raw, path)):
        try:
            parse()
            read = True
        except ApplianceError:
            continue
    return read


def run_recipe(raw: bytes) -> bool:
    path = good.emptied("recipe") / "recipe.toml"
    path.write_bytes(raw)
    problems: list[str] = []
    values = recipe.read_file(path, problems)
    with contextlib.suppress(SeedError):
        recipe.check(values, now=good.NOW, agent=path.parent, problems=problems)
    return bool(values)


def run_ova(raw: bytes) -> bool:
    path = good.emptied("ova") / "image.ova"
    path.write_bytes(raw)
    try:
        found = ova_lint.lint(path, vmdk_to=path.with_name("disk.vmdk"))
    except ImageError:
        return False
    return not found.problems


TARGETS: dict[str, Target] = {
    "attached-disk": Target(run_attached_disk, lambda: [good.seed_iso()]),
    "audit": Target(run_audit, lambda: [good.audit_entries()]),
    "audit-file": Target(run_audit_file, lambda: [good.audit_entries(), good.store_copy(), good.witness_file()]),
    "backup": Target(run_backup, lambda: [good.backup()]),
    "bundle": Target(run_bundle, lambda: [good.bundle()]),
    "certificate": Target(run_certificate, lambda: [good.authority().certificate_pem]),
    "channel-answer": Target(run_channel_answer, lambda: [good.http_answer(b'{"sequence":1,"interval_s":5.0}')]),
    "channel-request": Target(
        run_channel_request, lambda: [good.hello(), good.heartbeat(), b'{"ticket":"x"}', good.rotate_key()]
    ),
    "document": Target(run_document, lambda: [good.mode_file()]),
    "endpoint": Target(run_endpoint, lambda: [b"node-1.example:8443", b"[2001:db8::1]:8443", b"192.0.2.1"]),
    "enrollment": Target(run_enrollment, lambda: [good.enrollment()]),
    "health": Target(run_health, lambda: [good.health_file()]),
    "host-key-probe": Target(run_host_key_probe, lambda: [good.host_key_proof()]),
    "http": Target(run_http, lambda: [b"POST /v1/enroll HTTP/1.1\r\nHost: c\r\nContent-Length: 2\r\n\r\n{}"]),
    "https-answer": Target(
        run_https_answer,
        lambda: [
            good.http_answer(b'{"nonce":"n","time":1}'),
            # Without a length: what is damaged within is still read to its end.
            b"HTTP/1.1 201 Created\r\n\r\n" + good.grant(),
            b"HTTP/1.1 202 Accepted\r\n\r\n" + good.pending(),
            b"HTTP/1.1 409 Conflict\r\n\r\n" + strict_json.encode(enroll.Refusals.NONCE_STALE.problem(nonce="n")),
        ],
    ),
    "image-report": Target(run_image_report, lambda: [good.image_report()]),
    "iso": Target(run_iso, lambda: [good.seed_iso()]),
    "jws": Target(run_jws, lambda: [good.signed_enrollment()]),
    "network-config": Target(run_network_config, lambda: [good.network_config()]),
    "nonce": Target(run_nonce, lambda: [Nonces(b"k" * 32).issue(good.NOW).encode()]),
    "ovf": Target(run_ovf, lambda: [good.ovf_environment()]),
    "ova": Target(run_ova, lambda: [good.ova()]),
    "partition-table": Target(run_partition_table, lambda: [good.partition_table()]),
    "private-key": Target(
        run_private_key, lambda: [good.identity().pkcs8().reveal(), good.identity().openssh().reveal()]
    ),
    "public-key": Target(run_public_key, lambda: [good.host_key().encode()]),
    "receipt": Target(run_receipt, lambda: [good.receipt()]),
    "record": Target(run_record, lambda: [good.image_key_record()]),
    "recipe": Target(run_recipe, lambda: [good.recipe()]),
    "refresh": Target(run_refresh, lambda: [good.refresh()]),
    "seed": Target(run_seed, lambda: [bytes([i]) + good.seed_files()[name] for i, name in enumerate(good.SEED_NAMES)]),
    "settings": Target(run_settings, lambda: [b'[controller]\nenroll_listen = "0.0.0.0:8443"\n[log]\nlevel = "info"']),
    "spool": Target(run_spool, lambda: [b"+", b"+" + b"\0" * 16]),
    "telemetry": Target(run_telemetry, lambda: [good.sample(), good.sample_wire()]),
    "token": Target(
        run_token, lambda: [token.compose(bytes(32)).encode(), token.compose(bytes(32), rejoin=good.SE_ID).encode()]
    ),
    "trust": Target(
        run_trust,
        lambda: [
            good.trust_document(), strict_json.encode(good.envelope()),
            strict_json.encode(TrustAnswer(trust=good.envelope())), b'{"version":1}',
        ],
    ),
}  # fmt: skip
