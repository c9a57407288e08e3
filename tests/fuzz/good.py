"""Good input of each reader: one cluster of this process, its keys, and the documents that they signed."""

from __future__ import annotations

import asyncio
import atexit
import copy
import functools
import os
import shutil
import struct
import tempfile
import uuid
from pathlib import Path

import asyncssh

from appliance.controller.audit import Audit
from appliance.controller.records import ImageKeyRecord, encode
from appliance.controller.registry import Registry
from appliance.controller.store.copy import copy_store
from appliance.controller.store.sqlite import SqliteStore
from appliance.machine import gpt
from appliance.paths import Paths
from appliance.pki import jws as signatures
from appliance.pki import sealed
from appliance.pki.authority import Authority
from appliance.pki.host_key_probe import HostKeyProbe
from appliance.pki.identity import Identity
from appliance.pki.image_key import create_image_key
from appliance.pki.secret import Secret
from appliance.protocol import audit, ovf, strict_json, telemetry, token, tunnel
from appliance.protocol import seed as seeds
from appliance.protocol.address import se_address
from appliance.protocol.enroll import Claim, EnrollRequest, Grant, InstanceFacts, Pending, Policy, RefreshRequest
from appliance.protocol.image import REPORT_SCHEMA, ImageReport
from appliance.protocol.operator import AuditEntry
from appliance.protocol.telemetry import Point, Sample
from appliance.protocol.trust import (
    AUDIT_HEAD_TYPE,
    RECEIPT_TYPE,
    TRUST_TYPE,
    AuditHead,
    Envelope,
    Receipt,
    TrustDocument,
    TrustNode,
)
from appliance.runtime.clock import SystemClock
from appliance.runtime.health import Health
from appliance.runtime.mode import ModeDocument, document_of
from image_builder import cloud, iso
from image_builder import ova as images
from image_builder import seed as baking

NOW = 1_790_000_000
CLUSTER = "11111111-1111-4111-8111-111111111111"
SE_ID = "22222222-2222-4222-8222-222222222222"
BACKUP_MAGIC = b"appliance-fuzz 1"
PASSPHRASE = Secret(b"five random words or more")


@functools.cache
def _folder(_pid: int) -> Path:
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="appliance-fuzz-", dir=place))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def emptied(name: str) -> Path:
    """An empty directory of this process, in memory where there is such a place."""
    path = _folder(os.getpid()) / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    return path


@functools.cache
def authority() -> Authority:
    return Authority.create(CLUSTER, now=NOW)


def anchors() -> list[str]:
    return [authority().certificate_pem.decode()]


@functools.cache
def image_key() -> tuple[str, Identity]:
    return create_image_key()


@functools.cache
def identity() -> Identity:
    return Identity.create()


@functools.cache
def host_key() -> str:
    return Identity.create().public_line


@functools.cache
def trust_document() -> bytes:
    node = TrustNode(number=1, enroll=["127.0.0.1:8443"], ssh=["127.0.0.1:22"], host_keys=[host_key()])
    login = Identity.create().public_line
    document = TrustDocument(
        cluster_id=CLUSTER, version=1, epoch=1, signed_at=NOW, roots=anchors(), nodes=[node], login_keys=[login]
    )
    return strict_json.encode(document)


@functools.cache
def envelope() -> Envelope:
    return authority().sign(TRUST_TYPE, trust_document())


def receipt() -> bytes:
    found = Receipt(
        cluster_id=CLUSTER, se_id=SE_ID, thumbprint=identity().thumbprint, number=1, image_key_id=image_key()[0],
        epoch=1, issued_at=NOW,
    )  # fmt: skip
    return strict_json.encode(found)


def enrollment() -> bytes:
    facts = InstanceFacts(boot_id=SE_ID, macs=["02:00:00:00:00:01"])
    found = EnrollRequest(
        audience=CLUSTER, nonce="n", se_id=SE_ID, se_key=identity().public_line, host_keys=[host_key()], facts=facts,
        agent_version="1", attempt_id="0" * 16, hints=seeds.Hints(name="web-1", labels={"site": "north"}), token="",
    )  # fmt: skip
    return strict_json.encode(found)


@functools.cache
def signed_enrollment() -> bytes:
    key_id, key = image_key()
    return signatures.sign(enrollment(), [("image", key_id, key), ("se", identity().thumbprint, identity())])


@functools.cache
def grant() -> bytes:
    found = Grant(
        cluster_id=CLUSTER, se_id=SE_ID, name="web-1", number=1, address=se_address(1), trust=envelope(),
        receipt=authority().sign(RECEIPT_TYPE, receipt()), heartbeat_interval_s=5.0,
    )  # fmt: skip
    return strict_json.encode(found)


def pending() -> bytes:
    return strict_json.encode(Pending(se_id=SE_ID, fingerprint=identity().thumbprint, retry_after_s=10))


@functools.cache
def _probe() -> HostKeyProbe:
    return HostKeyProbe()


def probe() -> HostKeyProbe:
    """A probe at its beginning, with the same secrets each time: what was proved to one is proved to all."""
    found = copy.copy(_probe())
    found._buffer = bytearray()
    return found


@functools.cache
def host_key_proof() -> bytes:
    """What an SSH server with the host key `identity` says to such a probe."""

    async def listen() -> bytes:
        gone = asyncio.Event()

        class Server(asyncssh.SSHServer):
            def connection_lost(self, exc: Exception | None) -> None:
                gone.set()

        key = asyncssh.import_private_key(identity().openssh().reveal())
        acceptor = await asyncssh.listen(
            "127.0.0.1", 0, server_factory=Server, server_host_keys=[key], kex_algs=["curve25519-sha256"]
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", acceptor.get_port())
        asks, said = probe(), b""
        writer.write(asks.hello)
        while asks.host_key is None:
            received = await reader.read(1 << 16)
            assert received
            said += received
            writer.write(asks.feed(received))
        writer.close()
        await writer.wait_closed()
        await gone.wait()
        acceptor.close()
        await acceptor.wait_closed()
        return said

    return asyncio.run(listen())


def hello() -> bytes:
    found = tunnel.Hello(
        protocol=1, agent_version="1", facts=InstanceFacts(), ticket="", trust_version=1, time=1.5,
        host_keys=[host_key()],
    )  # fmt: skip
    return strict_json.encode(found)


def heartbeat() -> bytes:
    return strict_json.encode(tunnel.Heartbeat(sequence=1, time=1.5, telemetry=["x"]))


def sample() -> bytes:
    point = Point("system.cpu.load_average.1m", (), 0.43)
    return telemetry.encode(Sample(time=float(NOW), points=[point])).encode()


def sample_wire() -> bytes:
    return telemetry._inflate(sample().decode())


def http_answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body


@functools.cache
def bundle() -> bytes:
    key_id, key = image_key()
    found = seeds.Bundle(
        schema=seeds.SCHEMA, cluster_id=CLUSTER, root_ca=anchors()[0], image_key_id=key_id,
        image_key=key.pkcs8().reveal().decode(), controllers=["127.0.0.1:8443"], trust=envelope(),
    )  # fmt: skip
    return strict_json.encode(found)


def image_report() -> bytes:
    found = ImageReport(
        schema=REPORT_SCHEMA, image_id="seed-0123456789abcdef", name="edge", role="se", cluster_id=CLUSTER,
        image_key_id=image_key()[0], baked_at=NOW, controllers=["127.0.0.1:8443"], agent_version="1", agent_digest="",
        system="minimal:x", disk_bytes=1, files={"edge.qcow2": "0" * 64}, also=["seed-00000000000000b2"],
    )  # fmt: skip
    return strict_json.encode(found)


@functools.cache
def _baked() -> baking.BakedSeed:
    return baking.bake(bundle(), baking.Wishes(name="web-1"), baked_at=NOW, now=NOW)


def seed_files() -> dict[str, bytes]:
    """The files that an SE reads, by name."""
    return {file.name: file.content for file in _baked().files if file.name in SEED_NAMES}


SEED_NAMES = (seeds.SEED_FILE, seeds.ROOT_CA_FILE, seeds.TRUST_FILE, seeds.IMAGE_KEY_FILE)


@functools.cache
def seed_iso() -> bytes:
    return iso.render(_baked().files, at=NOW)


def network_config() -> bytes:
    network = cloud.Network(addresses=["192.0.2.10/24"], gateways=["192.0.2.1"], dns=["192.0.2.53"], vlan=12)
    return cloud.network_config(network, target=cloud.Target.OWN) or b""


def partition_table() -> bytes:
    """A table of three partitions: the first copy, behind a byte that says so."""
    entries = b"".join(
        uuid.UUID(int=number).bytes_le * 2
        + struct.pack("<QQQ", start, start + 99, 0)
        + "a".encode("utf-16-le")
        + bytes(70)
        for number, start in ((1, 100), (2, 200), (3, 300))
    )
    table = gpt.Table(bytes(16), 34, entries.ljust(128 * 128, b"\0"), ())
    return b"\0" + gpt.without(table, 9, grow=9, sectors=8192).first


def ovf_environment() -> bytes:
    words = {"controllers": "192.0.2.1", "token": token.compose(bytes(32)), "address": "192.0.2.9/24", "hostname": "a"}
    lines = "".join(f'<Property oe:key="{ovf.CLASS}.{key}" oe:value="{value}"/>' for key, value in words.items())
    head = f'<Environment xmlns="{ovf.NAMESPACE}" xmlns:oe="{ovf.NAMESPACE}">'
    return f"{head}<PropertySection>{lines}</PropertySection></Environment>".encode()


@functools.cache
def backup() -> bytes:
    return sealed.seal(b"content", PASSPHRASE, magic=BACKUP_MAGIC, about={"cluster": CLUSTER})


def audit_entries() -> bytes:
    previous, entries = audit.genesis(CLUSTER, 1, 1), []
    for sequence in range(1, 4):
        entry = audit.seal(
            AuditEntry(
                sequence=sequence, time=float(NOW), node=1, epoch=1, actor="uid 0", action="test", subject=CLUSTER,
                detail="", previous=previous,
            )
        )  # fmt: skip
        previous = entry.hash
        entries.append(entry)
    return strict_json.encode(entries)


def mode_file() -> bytes:
    paths = Paths(emptied("mode"))
    paths.mode_file.parent.mkdir(parents=True)
    document_of(paths).save(ModeDocument())
    return paths.mode_file.read_bytes()


def health_file() -> bytes:
    path = emptied("health") / "health.json"
    Health(path, "se", SystemClock()).line("se", "UP", "", ["192.0.2.1"])
    return path.read_bytes()


def image_key_record() -> bytes:
    key_id, key = image_key()
    record = ImageKeyRecord(
        image_key_id=key_id, public_key=key.public_line, policy=Policy.OPEN, created_at=NOW, expires_at=NOW + 1,
        max_uses=1,
    )  # fmt: skip
    return encode(record)


def refresh() -> bytes:
    claim = Claim(
        receipt=authority().sign(RECEIPT_TYPE, receipt()), se_key=identity().public_line, host_keys=[host_key()],
        facts=InstanceFacts(boot_id=SE_ID),
    )  # fmt: skip
    found = RefreshRequest(
        audience=CLUSTER, nonce="n", se_id=SE_ID, agent_version="1", attempt_id="0" * 16, claim=claim
    )
    return strict_json.encode(found)


def rotate_key() -> bytes:
    return strict_json.encode(tunnel.RotateKey(se_key=identity().public_line, proof="x" * 86))


@functools.cache
def store_copy() -> bytes:
    """A store with an audit of three entries."""
    path = emptied("store") / "store.sqlite"

    async def fill() -> None:
        store = SqliteStore.open(path, clock=SystemClock())
        try:
            registry = Registry(store, Audit(store, cluster_id=CLUSTER, node=1, epoch=1), wall=lambda: float(NOW))
            await registry.load(reserved=())
            for number in range(3):
                await registry.note(actor="uid 0", action="test", subject=CLUSTER, detail=str(number))
        finally:
            await store.close()

    asyncio.run(fill())
    return copy_store(path)


def witness_file() -> bytes:
    body = AuditHead(cluster_id=CLUSTER, node=1, epoch=1, sequence=3, hash="0" * 64, time=NOW)
    head = authority().sign(AUDIT_HEAD_TYPE, strict_json.encode(body))
    return b'{"value":{"heads":[%s]}}' % strict_json.encode(head)


@functools.cache
def recipe() -> bytes:
    text = """
name = "edge"
role = "se"
bundle = "bundle.json"
controllers = ["192.0.2.1:8443"]
labels = ["site=north"]
hostname = "edge-1"
[base]
image = "minimal"
[disk]
size = "4G"
"""
    return text.encode()


@functools.cache
def ova() -> bytes:
    """An OVA whose disk is a header alone."""
    folder = emptied("making")
    vmdk = folder / "disk.vmdk"
    head = struct.pack("<4sIIQQQQ", b"KDMV", 3, 0x30001, 2048, 128, 1, 1).ljust(512, b"\0")
    vmdk.write_bytes(head + b"CID=00000000\n".ljust(1024, b"\0"))
    image = images.Machine(name="edge", version="1", image_id="img-1", disk_bytes=2048 * 512)
    images.write(folder / "image.ova", vmdk, image, stem="edge", epoch=NOW, populated_bytes=1024)
    return (folder / "image.ova").read_bytes()
