"""The controller's trust material on disk: what `controller init` wrote and the daemon loads.

cluster.json          ClusterFile: cluster id, node number, epoch
root-ca.pem/.key      the root CA
node.pem/.key         this node's TLS certificate
ssh_host_ed25519_key  this node's SSH host key
id_se                 the key that logs in to SEs over the reverse path
trust.json            the newest trust document, in its envelope
nonce.key             32 bytes that authenticate nonces
bundles/<id>.json     bundles of image keys made at init, for image pipelines (0600)
"""

from __future__ import annotations

import secrets
from pathlib import Path

import msgspec

from appliance.errors import StorageError
from appliance.pki import ssh_keys
from appliance.pki.authority import Authority, certificate_terms
from appliance.pki.trust import verify_trust
from appliance.protocol import strict_json
from appliance.protocol.address import format_endpoint
from appliance.protocol.trust import MAX_TRUST_BYTES, TRUST_TYPE, Envelope, TrustDocument, TrustNode
from appliance.storage.atomic import make_dir, read_limited, write_atomic

NODE_CERTIFICATE_DAYS = 90
RENEW_AT = 2 / 3
"""Part of a node certificate's life after which it is renewed."""


class ClusterFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`cluster.json`."""

    cluster_id: str
    node: int
    epoch: int
    addresses: list[str]
    """Names and IP addresses of this node, as the trust document and the node certificate carry them."""
    enroll_port: int
    ssh_port: int


class Files:
    """Paths below the controller's state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.cluster = state / "cluster.json"
        self.root_certificate = state / "root-ca.pem"
        self.root_key = state / "root-ca.key"
        self.node_certificate = state / "node.pem"
        self.node_key = state / "node.key"
        self.host_key = state / "ssh_host_ed25519_key"
        self.login_key = state / "id_se"
        self.trust = state / "trust.json"
        self.nonce_key = state / "nonce.key"
        self.bundles = state / "bundles"
        self.store = state / "store.sqlite"


class Material:
    """The loaded material. Private halves stay inside `pki` types."""

    def __init__(self, files: Files) -> None:
        """Loads everything. Raises `StorageError` where `controller init` has not run or a file is missing."""
        self.files = files
        try:
            self.cluster = strict_json.decode(
                read_limited(files.cluster, max_bytes=65536), ClusterFile, max_bytes=65536
            )
            self.root_pem = read_limited(files.root_certificate, max_bytes=65536).decode()
            self.authority = Authority.load(self.root_pem.encode(), read_limited(files.root_key, max_bytes=65536))
            self.envelope = strict_json.decode(
                read_limited(files.trust, max_bytes=MAX_TRUST_BYTES), Envelope, max_bytes=MAX_TRUST_BYTES
            )
            self.nonce_key = read_limited(files.nonce_key, max_bytes=64)
        except FileNotFoundError as error:
            raise StorageError(
                f"{error.filename} is missing: this root holds no initialised controller",
                hint="run `appliance controller init`, or restore a backup",
            ) from None
        self.trust: TrustDocument = verify_trust(self.envelope, anchors=[self.root_pem], current=None)

    @property
    def node_certificate_expires_at(self) -> int:
        """End of the node certificate's life, seconds since 1970."""
        return certificate_terms(self.files.node_certificate.read_bytes()).not_after

    def renewal_due(self, now: float) -> bool:
        """Whether two thirds of the node certificate's life are over."""
        terms = certificate_terms(self.files.node_certificate.read_bytes())
        return now >= terms.not_before + (terms.not_after - terms.not_before) * RENEW_AT

    def renew_node_certificate(self, now: int) -> None:
        """Issues a new node key and certificate; the live listener reloads them from the same paths.

        The key is written first: a crash in between leaves a pair that doesn't match, which `load_cert_chain`
        refuses and the next start repairs by issuing again.
        """
        issue_node_certificate(self.authority, self.files, self.cluster, now=now)


def issue_node_certificate(authority: Authority, files: Files, cluster: ClusterFile, *, now: int) -> None:
    """Writes a fresh node key and certificate."""
    issued = authority.issue_node(node=cluster.node, addresses=cluster.addresses, now=now, days=NODE_CERTIFICATE_DAYS)
    write_atomic(files.node_key, issued.key.reveal(), mode=0o600)
    write_atomic(files.node_certificate, issued.certificate_pem, mode=0o644)


def create(files: Files, *, cluster_id: str, addresses: list[str], enroll_port: int, ssh_port: int, now: int) -> None:
    """Makes all material of a one-node cluster below `files`; ports are those that SEs see."""
    make_dir(files.state, mode=0o700)
    make_dir(files.bundles, mode=0o700)
    cluster = ClusterFile(
        cluster_id=cluster_id, node=1, epoch=1, addresses=addresses, enroll_port=enroll_port, ssh_port=ssh_port
    )
    authority = Authority.create(cluster_id, now=now)
    write_atomic(files.root_key, authority.key_pem().reveal(), mode=0o600)
    write_atomic(files.root_certificate, authority.certificate_pem, mode=0o644)
    issue_node_certificate(authority, files, cluster, now=now)
    lines = {}
    for path in (files.host_key, files.login_key):
        private, line = ssh_keys.generate()
        lines[path] = line
        write_atomic(path, private.reveal(), mode=0o600)
        write_atomic(path.with_name(path.name + ".pub"), line.encode() + b"\n", mode=0o644)
    write_atomic(files.nonce_key, secrets.token_bytes(32), mode=0o600)
    trust = TrustDocument(
        cluster_id=cluster_id,
        version=1,
        epoch=1,
        signed_at=now,
        roots=[authority.certificate_pem.decode()],
        nodes=[
            TrustNode(
                number=1,
                enroll=[format_endpoint(address, enroll_port) for address in addresses],
                ssh=[format_endpoint(address, ssh_port) for address in addresses],
                host_keys=[lines[files.host_key]],
            )
        ],
        login_keys=[lines[files.login_key]],
    )
    envelope = authority.sign(TRUST_TYPE, strict_json.encode(trust))
    write_atomic(files.trust, strict_json.encode(envelope), mode=0o644)
    write_atomic(files.cluster, strict_json.encode(cluster), mode=0o644)
