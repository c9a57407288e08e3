"""The trust document: what an SE believes about its cluster, signed by a root.

An envelope is a DSSE v1 envelope (github.com/secure-systems-lab/dsse, protocol.md): the signature covers
`PAE(type, body)`, so a signature over one kind of document can't be used as another kind. Signing and verifying live in
`appliance.pki`; this module holds the shapes and the rules that need no key: which version replaces which.
"""

from __future__ import annotations

import base64
import binascii

import msgspec

from appliance.errors import TrustError

TRUST_TYPE = "application/vnd.appliance.trust+json"
RECEIPT_TYPE = "application/vnd.appliance.receipt+json"
AUDIT_HEAD_TYPE = "application/vnd.appliance.audit-head+json"

TRUST_PATH = "/v1/enroll/trust"
"""On HTTPS 8443: TrustRequest -> TrustAnswer, for SEs that slept through changes of root."""

MAX_TRUST_BYTES = 256 * 1024
MAX_ROOT_CHANGES = 32
"""How many changes of root an SE may have slept through and still follow, one by one."""


class EnvelopeSignature(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One signature: key id (SHA-256 of the SubjectPublicKeyInfo, hex) and base64 signature."""

    keyid: str
    sig: str
    cert: str = ""
    """PEM certificate of an issuing CA that signed in its root's name; empty, and left out, where a root signed."""


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"payload_type": "payloadType"}):
    """A DSSE envelope: base64 payload, its type, and signatures over both."""

    payload: str
    payload_type: str
    signatures: list[EnvelopeSignature]

    def body(self) -> bytes:
        """Returns the payload bytes. Raises `TrustError` where it is no base64."""
        try:
            return base64.b64decode(self.payload, validate=True)
        except (binascii.Error, ValueError):
            raise TrustError("the envelope's payload is no base64") from None


def pre_authentication_encoding(payload_type: str, body: bytes) -> bytes:
    """Returns the bytes a DSSE signature covers (DSSE v1, PAE)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(body), body)


class TrustNode(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One controller node: where it listens, and the SSH host keys it may show."""

    number: int
    enroll: list[str]
    """`host:port` of HTTPS enrollment, most preferred first."""
    ssh: list[str]
    """`host:port` of the SSH gateway, most preferred first."""
    host_keys: list[str]
    """OpenSSH public key lines without comment."""


class TrustDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a cluster says about itself. Times are seconds since 1970 (UTC)."""

    cluster_id: str
    version: int
    epoch: int
    """Grows when a controller was restored from a backup, to the second in which that was done."""
    signed_at: int
    roots: list[str]
    """PEM certificates: the one in use, then the next."""
    nodes: list[TrustNode]
    revoked_node_keys: list[str] = []
    """SHA-256 of the SubjectPublicKeyInfo, hex, of node certificates that no longer count."""
    login_keys: list[str] = []
    """OpenSSH public keys that may log in to SEs through the reverse path."""
    bundle_key: str = ""
    """OpenSSH public key that signs upgrade bundles; empty until the upgrade stage has one."""


class TrustRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Asks for what follows on a version of the trust document. Unsigned: a trust document is no secret."""

    version: int


class TrustAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The trust document that ended the next change of root after that version, or the one in force."""

    trust: Envelope


class Receipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The controller's signed word that an SE enrolled; proves it to a controller restored from an older backup."""

    cluster_id: str
    se_id: str
    thumbprint: str
    number: int
    image_key_id: str
    epoch: int
    issued_at: int
    name: str = ""
    labels: dict[str, str] = {}


class AuditHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How far a node's audit chain had got; SEs keep the newest as witnesses (`protocol.audit`)."""

    cluster_id: str
    node: int
    epoch: int
    sequence: int
    hash: str
    time: int
    """When it was signed, seconds since 1970."""


def outlasts(before: TrustDocument, now: TrustDocument) -> bool:
    """Whether all that counted as signed under `before` still does under `now`: no root is gone, no key was revoked."""
    return set(before.roots) <= set(now.roots) and set(now.revoked_node_keys) <= set(before.revoked_node_keys)


def replaces(new: TrustDocument, current: TrustDocument | None) -> bool:
    """Decides whether a verified `new` document takes the place of `current`.

    An older version is kept out (rollback), an equal one changes nothing. A controller restored from a backup goes on
    with a version above all that its predecessor can have reached (docs/adr/0009).

    Raises:
        TrustError: `new` speaks for another cluster.
    """
    if current is None:
        return True
    if new.cluster_id != current.cluster_id:
        raise TrustError(
            f"trust document of cluster {new.cluster_id}, expected {current.cluster_id}",
            hint="this SE belongs to another cluster; check the controller address",
        )
    return new.version > current.version
