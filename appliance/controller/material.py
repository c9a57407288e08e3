"""The controller's trust material on disk: what `controller init` wrote and the daemon loads.

cluster.json          ClusterFile: cluster id, node number, epoch
root-ca.pem/.key      the root CA; the key is sealed where it has a passphrase
issuing-ca.pem/.key   the issuing CA, which signs in the root's name, where the root key has a passphrase
node.pem/.key         this node's TLS certificate, followed by what leads from it to the root
ssh_host_ed25519_key  this node's SSH host key
id_se                 the key that logs in to SEs over the reverse path
trust.json            the newest trust document, in its envelope
trust-<version>.json  the one that ended a change of root, for SEs that slept through it and a later one
rotation.json         changes of roots and keys under way, see `rotation`; next-* and former-* are theirs
switching.json        files being put in place, see `switching`; staged-* and gone-* are its own
backup-due            empty; there since the root changed, until a backup was taken
cross-ca.pem          the root's key, certified by the root before it, that one's by the one before, and so on: sent
                      with the node certificate
nonce.key             32 bytes that authenticate nonces
bundles/<id>.json     bundles of image keys made at init, for image pipelines (0600)
store.sqlite          the store
initialised           empty; written last by `controller init`
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from appliance.errors import StorageError, TrustError
from appliance.pki import sealed, ssh_keys
from appliance.pki.authority import Authority, CertificateTerms, IssuedKey, Issuer
from appliance.pki.certificate import all_of, certificate_terms, first_of, is_issued_by
from appliance.pki.secret import Secret
from appliance.pki.trust import verify_trust
from appliance.protocol import strict_json
from appliance.protocol.address import format_endpoint
from appliance.protocol.strict_json import MalformedError
from appliance.protocol.trust import MAX_TRUST_BYTES, TRUST_TYPE, Envelope, TrustDocument, TrustNode
from appliance.storage.atomic import make_dir, read_limited, write_atomic

T = TypeVar("T")

MAX_FILE_BYTES = 64 * 1024
NONCE_KEY_BYTES = 32
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
        self.cross_certificate = state / "cross-ca.pem"
        self.issuing_certificate = state / "issuing-ca.pem"
        self.issuing_key = state / "issuing-ca.key"
        self.node_certificate = state / "node.pem"
        self.node_key = state / "node.key"
        self.host_key = state / "ssh_host_ed25519_key"
        self.login_key = state / "id_se"
        self.trust = state / "trust.json"
        self.nonce_key = state / "nonce.key"
        self.bundles = state / "bundles"
        self.store = state / "store.sqlite"
        self.ready = state / "initialised"
        self.backup_due = state / "backup-due"

    def former(self, path: Path) -> Path:
        """Where the root's file `path` is kept after a change of root."""
        return path.with_name(f"former-{path.name}")

    def succession(self, version: int) -> Path:
        """Where the trust document of that version is kept, which ended a change of root."""
        return self.state / f"trust-{version}.json"

    def successor(self, path: Path) -> Path:
        """Where the successor of `path` lies until it takes its place."""
        return path.with_name(f"next-{path.name}")

    def check_ready(self) -> None:
        """Raises `StorageError` where `controller init` hasn't run to its end, or what it made last is gone."""
        if not self.ready.exists():
            raise StorageError(
                f"{self.state} holds no initialised controller",
                hint="run `appliance controller init`, or restore a backup",
            )
        if not self.store.exists():
            # An empty one would be made: every SE a stranger, its number given away again.
            raise StorageError(f"the store {self.store} is missing", hint=f"restore it from a backup of {self.state}")


def _load(path: Path, decode: Callable[[bytes], T], *, max_bytes: int = MAX_FILE_BYTES) -> T:
    """Reads and decodes one file. Raises `StorageError` naming it, where it is missing or damaged."""
    hint = f"restore it from a backup of {path.parent}"
    try:
        return decode(read_limited(path, max_bytes=max_bytes))
    except FileNotFoundError:
        raise StorageError(f"{path} is missing", hint=hint) from None
    except (MalformedError, TrustError) as error:
        raise StorageError(f"{path} is damaged: {error.message}", hint=hint) from None


def _certificate(pem: bytes) -> bytes:
    certificate_terms(pem)
    return pem


class Succession(NamedTuple):
    """A trust document that ended a change of root."""

    version: int
    envelope: Envelope


def _versioned(raw: bytes) -> Succession:
    envelope = strict_json.decode(raw, Envelope, max_bytes=MAX_TRUST_BYTES)
    document = strict_json.decode(envelope.body(), TrustDocument, max_bytes=MAX_TRUST_BYTES)
    return Succession(document.version, envelope)


def _nonce_key(raw: bytes) -> bytes:
    # A shorter key would still make MACs, which anybody could make: of an empty file for example.
    if len(raw) != NONCE_KEY_BYTES:
        raise MalformedError(f"{len(raw)} bytes, {NONCE_KEY_BYTES} expected")
    return raw


def _public_line(private: bytes) -> str:
    return ssh_keys.public_line(ssh_keys.load_private(private).public_key().public_bytes_raw())


A = TypeVar("A", bound=Issuer)


def _load_authority(kind: type[A], certificate: Path, key: Path) -> A:
    pem = _load(certificate, _certificate)
    return _load(key, lambda raw: kind.load(pem, raw))


class Opened(NamedTuple):
    """The roots with their keys open."""

    authority: Authority
    former: Authority | None
    successor: Authority | None


class Material:
    """The loaded material. Private halves stay inside `pki` types."""

    def __init__(self, files: Files) -> None:
        """Loads everything but the node certificate, which can be issued anew.

        Raises:
            StorageError: a file is missing or damaged, or two of them don't belong together; it names them.
        """
        self.files = files
        self.cluster = _load(files.cluster, lambda raw: strict_json.decode(raw, ClusterFile, max_bytes=MAX_FILE_BYTES))
        self.load_authorities()
        if self.authority.cluster_id != self.cluster.cluster_id:
            raise StorageError(
                f"{files.root_certificate} is of cluster {self.authority.cluster_id}, {files.cluster} of "
                f"{self.cluster.cluster_id}",
                hint=f"restore both from one backup of {files.state}",
            )
        self.load_trust()
        self.nonce_key = _load(files.nonce_key, _nonce_key)
        host_key = _load(files.host_key, _public_line)
        _load(files.login_key, _public_line)
        if not any(host_key in node.host_keys for node in self.trust.nodes if node.number == self.cluster.node):
            raise StorageError(
                f"{files.host_key} is not the host key that {files.trust} tells SEs: none of them would link",
                hint=f"restore both from one backup of {files.state}",
            )

    def load_trust(self) -> None:
        """Loads the trust document in force. Raises `StorageError` where it is missing or damaged."""
        self.envelope, self.trust = _load(self.files.trust, self._verified, max_bytes=MAX_TRUST_BYTES)
        kept = [_load(path, _versioned, max_bytes=MAX_TRUST_BYTES) for path in self.files.state.glob("trust-*.json")]
        self.successions = sorted(kept, key=lambda entry: entry.version)
        """The documents that ended changes of root, oldest first: each was signed by the root before it."""

    def load_authorities(self) -> None:
        """Loads the root, its predecessor and successor where there are such, and the issuing CA.

        Raises:
            StorageError: a file is missing or damaged, or a pair doesn't belong together.
        """
        files = self.files
        self.authority = _load_authority(Authority, files.root_certificate, files.root_key)
        self.root_pem = self.authority.certificate_pem.decode()
        self.former, self.successor = (
            _load_authority(Authority, place(files.root_certificate), place(files.root_key))
            if place(files.root_key).exists() and place(files.root_certificate).exists()
            else None
            for place in (files.former, files.successor)
        )
        self.issuing: Issuer | None = None
        if self.authority.is_locked:
            self.issuing = _load_authority(Issuer, files.issuing_certificate, files.issuing_key)
            if not is_issued_by(self.issuing.certificate_pem, self.root_pem):
                raise StorageError(
                    f"{files.issuing_certificate} was not issued by the root CA in {files.root_certificate}",
                    hint=f"restore both from one backup of {files.state}",
                )

    @property
    def issuer(self) -> Issuer:
        """Who signs node certificates, receipts and audit heads: the issuing CA, or the root where there is none."""
        return self.issuing or self.authority

    def unlock(self, passphrase: Secret) -> Opened:
        """Opens the keys of the roots, half a second and 128 MiB each; for a thread.

        Raises:
            PassphraseError: the wrong passphrase.
        """
        return Opened(
            self.authority.unlock(passphrase),
            self.former.unlock(passphrase) if self.former else None,
            self.successor.unlock(passphrase) if self.successor else None,
        )

    def check_open(self) -> None:
        """Raises `PassphraseError` where a root that signs trust documents is locked."""
        for authority in self.signers:
            authority.check_open()

    @contextmanager
    def unlocked(self, opened: Opened) -> Iterator[None]:
        """Within it the roots are open; what is then loaded anew from the files is locked again."""
        self.authority, self.former, self.successor = opened
        try:
            yield
        finally:
            self.load_authorities()

    @property
    def anchors(self) -> list[str]:
        """PEM of all roots whose signatures count here: those of the trust document, and a former one that is kept."""
        return [*self.trust.roots, *([self.former.certificate_pem.decode()] if self.former else [])]

    @property
    def signers(self) -> list[Authority]:
        """Who signs a trust document: the root, and during and after a change of root the other one too."""
        return [entry for entry in (self.authority, self.successor, self.former) if entry is not None]

    def _verified(self, raw: bytes) -> tuple[Envelope, TrustDocument]:
        envelope = strict_json.decode(raw, Envelope, max_bytes=MAX_TRUST_BYTES)
        return envelope, verify_trust(envelope, anchors=[self.root_pem], current=None)

    def node_terms(self) -> CertificateTerms | None:
        """The node certificate's terms, or None where it is missing or damaged."""
        try:
            return _load(self.files.node_certificate, lambda raw: certificate_terms(first_of(raw)))
        except StorageError:
            return None

    @property
    def node_certificate_expires_at(self) -> int:
        """End of the node certificate's life, seconds since 1970; 0 where there is none that can be read."""
        terms = self.node_terms()
        return terms.not_after if terms else 0

    def renewal_due(self, now: float) -> bool:
        """Whether a new node certificate is to be issued.

        It is where there is none that can be read, or another than the present issuer signed it, or two thirds of its
        life are over and a new one would live longer.
        """
        terms = self.node_terms()
        if terms is None or not is_issued_by(_load(self.files.node_certificate, first_of), self.issuer.certificate_pem):
            return True
        is_old = now >= terms.not_before + (terms.not_after - terms.not_before) * RENEW_AT
        return is_old and terms.not_after < self.issuer.expires_at

    def renew_node_certificate(self, now: int) -> None:
        """Issues a new node key and certificate; the live listener reloads them from the same paths.

        The key is written first: a crash in between leaves a pair that doesn't match, which `load_cert_chain`
        refuses and the next start repairs by issuing again.
        """
        issue_node_certificate(self.issuer, self.files, self.cluster, now=now)


def write_pair(issued: IssuedKey, certificate: Path, key: Path) -> None:
    """Writes a key (0600), then its certificate."""
    write_atomic(key, issued.key.reveal(), mode=0o600)
    write_atomic(certificate, issued.certificate_pem, mode=0o644)


def issue_node_certificate(issuer: Issuer, files: Files, cluster: ClusterFile, *, now: int) -> None:
    """Writes a fresh node key and certificate, with what leads from it to the root."""
    issued = issuer.issue_node(node=cluster.node, addresses=cluster.addresses, now=now, days=NODE_CERTIFICATE_DAYS)
    write_atomic(files.node_key, issued.key.reveal(), mode=0o600)
    chain = issued.certificate_pem + issuer.chain_pem
    if files.cross_certificate.exists():
        # Who still trusts only a former root gets to this node by way of it.
        chain += b"".join(_load(files.cross_certificate, all_of))
    write_atomic(files.node_certificate, chain, mode=0o644)


def create(
    files: Files,
    *,
    cluster_id: str,
    addresses: list[str],
    enroll_port: int,
    ssh_port: int,
    now: int,
    passphrase: Secret | None = None,
) -> None:
    """Makes all material of a one-node cluster below `files`; ports are those that SEs see.

    With a `passphrase` the root key is sealed under it, and an issuing CA does the daily signing.

    Raises:
        UsageError: a passphrase that protects nothing, or an address that can't stand in a certificate.
    """
    if passphrase is not None:
        sealed.check_passphrase(passphrase)
    make_dir(files.state, mode=0o700)
    make_dir(files.bundles, mode=0o700)
    cluster = ClusterFile(
        cluster_id=cluster_id, node=1, epoch=1, addresses=addresses, enroll_port=enroll_port, ssh_port=ssh_port
    )
    authority = Authority.create(cluster_id, now=now)
    write_atomic(files.root_key, authority.key_file(passphrase).reveal(), mode=0o600)
    write_atomic(files.root_certificate, authority.certificate_pem, mode=0o644)
    issuer: Issuer = authority
    if passphrase is not None:
        issued = authority.issue_issuing(now=now)
        write_pair(issued, files.issuing_certificate, files.issuing_key)
        issuer = Issuer.load(issued.certificate_pem, issued.key.reveal())
    issue_node_certificate(issuer, files, cluster, now=now)
    lines = {}
    for path in (files.host_key, files.login_key):
        private, line = ssh_keys.generate()
        lines[path] = line
        write_atomic(path, private.reveal(), mode=0o600)
        write_atomic(path.with_name(path.name + ".pub"), line.encode() + b"\n", mode=0o644)
    write_atomic(files.nonce_key, secrets.token_bytes(NONCE_KEY_BYTES), mode=0o600)
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
