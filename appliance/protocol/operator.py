"""What the operator API says, on the controller's unix socket: shapes shared by `controller.operator` and `cli`.

    GET  /v1/controller                      ControllerView
    GET  /v1/status                          StatusView
    GET  /v1/ses                             list[SeSummary]          (protocol.fleet)
    GET  /v1/ses/{se}                        SeDetail                 {se}: number, name, se_id or address
    POST /v1/ses/{se}/revoke|delete          SeDetail                 body: Reasoned
    POST /v1/ses/{se}/approve                SeDetail                 body: Approval
    POST /v1/ses/{se}/reject|reinstate       SeDetail                 body: Reasoned
    GET  /v1/pending                         list[PendingView]        SEs that wait for approval, oldest first
    GET  /v1/why/{subject}                   Chain                    (protocol.why) SE, source address or attempt id
    GET  /v1/image-keys                      list[ImageKeyView]
    POST /v1/image-keys                      ImageKeyCreated          body: ImageKeyTermsWish
    POST /v1/image-keys/{id}/revoke          ImageKeyRevoked          body: Reasoned
    GET  /v1/images                          ImageList
    POST /v1/images                          ImageView                body: ImageReport (protocol.image)
    GET  /v1/images/{image}                  ImageDetail              {image}: id, name or SHA-256 of one of its files
    POST /v1/images/{image}/revoke           ImageRevoked             body: ImageRevocation
    GET  /v1/tokens                          list[TokenView]
    POST /v1/tokens                          TokenCreated             body: TokenWish
    POST /v1/tokens/{id}/revoke              TokenView                body: Reasoned
    GET  /v1/events?after=N&wait_s=S         list[Event]              held open up to S seconds where there is none yet
    GET  /v1/audit?after=N&limit=M           list[AuditEntry]
    GET  /v1/audit/verify                    AuditVerdict
    GET  /v1/ses/{se}/telemetry?since=T      list[Sample]             (protocol.telemetry) recent history, oldest first
    POST /v1/audit/head                      Envelope                 (protocol.trust) the newest entry, signed
    GET  /v1/recovery                        RecoveryView
    POST /v1/recovery/begin|end              RecoveryView             body: Reasoned
    POST /v1/recovery/approve                ReceiptsApproved         body: Reasoned
    GET  /v1/rotations                       list[RotationView]
    POST /v1/rotations/{kind}/begin|abort    RotationView             body: Unlocking
    POST /v1/rotations/{kind}/finish         RotationView             body: Forced
    POST /v1/rotations/{kind}/forget         RotationView             body: Reasoned
    POST /v1/passphrase/set|change           ControllerView           body: NewPassphrase
    POST /v1/passphrase/remove               ControllerView           body: Forced
    POST /v1/issuing-ca/renew                ControllerView           body: IssuingRenewal
    POST /v1/drain                           Drained                  stop admitting, used by mode set and stop
    GET  /v1/openapi.json                    OpenAPI 3.1

Errors are problem documents (protocol.problem). Times are seconds since 1970.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from appliance.protocol.enroll import InstanceFacts, Policy
from appliance.protocol.fleet import SeSummary
from appliance.protocol.seed import Bundle


class Reasoned(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Why an operator did it; goes into the audit."""

    reason: str = ""


class Unlocking(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What needs the root key; its passphrase where it has one. It is never shown."""

    passphrase: str = ""
    reason: str = ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(<redacted>)"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [("passphrase", "<redacted>")]


class Forced(Unlocking, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is refused without `force` where something speaks against it."""

    force: bool = False


class NewPassphrase(Unlocking, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A passphrase in place of the present one, or of none."""

    new: str


class IssuingRenewal(Unlocking, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new issuing CA; with `revoke`, SEs refuse what the present one signed."""

    revoke: bool = False


class ControllerView(msgspec.Struct, kw_only=True):
    """This controller."""

    cluster_id: str
    node: int
    epoch: int
    version: str
    root_fingerprint: str
    root_expires_at: int
    root_is_locked: bool = False
    """Whether the root key has a passphrase."""
    issuing_fingerprint: str = ""
    """Of the issuing CA's certificate, empty where there is none."""
    issuing_expires_at: int = 0
    node_certificate_expires_at: int
    trust_version: int
    addresses: list[str]
    enroll_port: int
    ssh_port: int
    reverse_port: int
    metrics_port: int
    pid: int
    started_at: float


class StatusView(msgspec.Struct, kw_only=True):
    """The fleet in one look."""

    controller: ControllerView
    states: dict[str, int]
    """State name to number of SEs."""
    links: int
    heartbeat_interval_s: float
    enrolled: int
    refusals: dict[str, int]
    """Refusal code to count since start."""
    problems: list[str]
    """What an operator should look at, one sentence each; empty where all is well."""


class SeDetail(msgspec.Struct, kw_only=True):
    """One SE, whole."""

    summary: SeSummary
    status: str
    thumbprint: str
    se_key: str
    host_keys: list[str]
    facts: InstanceFacts
    confirmed_at: float
    image_key_gone_at: float = 0.0
    """When the SE first said that it destroyed its copies of the image key; 0: it hasn't."""
    last_heartbeat_at: float
    drift: list[str]
    """Changed self-asserted facts, one sentence each."""
    alarms: list[str]
    image: str = ""
    """Name and fate of the image that it says it is from; "" where the ledger doesn't have that."""


class ImageKeyTermsWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Terms of a new image key."""

    policy: Policy = Policy.OPEN
    expires_in_s: int = 30 * 86400
    max_uses: int = 500
    networks: list[str] = []
    note: str = ""
    rate_per_s: float = 0.0
    """Requests that it may sign a second, and `burst` at once; 0 each: as the controller's settings say."""
    burst: int = 0


class ImageKeyView(msgspec.Struct, kw_only=True):
    """An image key as stored; the private half is never kept."""

    image_key_id: str
    policy: Policy
    created_at: int
    expires_at: int
    max_uses: int
    uses: int
    networks: list[str]
    note: str
    status: str
    """`active`, `expired`, `used-up` or `revoked`."""
    rate_per_s: float = 0.0
    burst: int = 0
    limited: int = 0
    """Requests refused since the controller's start because they were more than that."""
    images: list[str] = []
    """Ids of the images in the ledger that carry it."""


class ImageKeyCreated(msgspec.Struct, kw_only=True):
    """The one time that the private half is seen, inside its bundle."""

    key: ImageKeyView
    bundle: Bundle


class ImageView(msgspec.Struct, kw_only=True):
    """An image. Times are seconds since 1970, 0 where it has not happened."""

    image_id: str
    name: str
    """"" where the ledger doesn't have it."""
    status: str
    """`live`, `revoked`, `key revoked`, `key expired`, `key used-up`, or `unknown`: SEs name it, the ledger doesn't."""
    image_key_id: str
    ses: int
    """SEs that name it; their own word, but for the image key that they came by."""
    key_uses: int = 0
    key_max_uses: int = 0
    key_expires_at: int = 0
    baked_at: int = 0
    added_at: int = 0
    revoked_at: int = 0
    reason: str = ""
    agent_version: str = ""
    agent_digest: str = ""
    system: str = ""
    recipe_digest: str = ""
    also: list[str] = []
    files: list[tuple[str, str]] = []
    """Name and SHA-256."""


class ImageList(msgspec.Struct, kw_only=True):
    """The ledger, oldest first, and ids that only SEs name."""

    images: list[ImageView]
    unknown: list[ImageView]


class ImageDetail(msgspec.Struct, kw_only=True):
    """One image, and the SEs that name it."""

    image: ImageView
    ses: list[SeSummary]


class ImageRevocation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Revokes an image. `key` says what becomes of its image key where other live images carry it too."""

    reason: str = ""
    key: Literal["ask", "revoke", "keep"] = "ask"
    """`ask` refuses where there are others, and names them."""


class ImageRevoked(msgspec.Struct, kw_only=True):
    """A revoked image."""

    image: ImageView
    key_revoked: bool
    others: list[ImageView]
    """Other images with the same image key: dead with it, or the way in for whoever names one of them."""
    ses: list[SeSummary]
    """SEs that name this image."""
    by_key: list[SeSummary]
    """SEs that came by its image key and name another image, or none: who lies about its image is among them."""


class ImageKeyRevoked(msgspec.Struct, kw_only=True):
    """A revoked key, who came by it, and the images that carry it."""

    key: ImageKeyView
    ses: list[SeSummary]
    images: list[ImageView] = []


class Approval(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An approval; with a `fingerprint` it holds only while the SE's key has that one."""

    fingerprint: str = ""
    reason: str = ""


class PendingView(msgspec.Struct, kw_only=True):
    """An SE that waits for approval. Name, labels and facts are its own word."""

    se_id: str
    number: int
    name: str
    fingerprint: str
    """Of its key; its VM prints the same on its console."""
    labels: dict[str, str]
    source: str
    image_key_id: str
    policy: Policy
    token_id: str
    """Of a good token that it brought, "" where it brought none."""
    asked_at: float
    lapses_at: float
    facts: InstanceFacts
    receipt_epoch: int = 0
    """Of the receipt that it showed to a restored controller, 0 where it asks to enroll."""
    receipt_fault: str = ""
    """Why `approve --receipts` passes it over."""


class TokenWish(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Terms of a new token."""

    image_key_id: str = ""
    """"" takes the one active image key of the policy `token`."""
    rejoin: str = ""
    """The SE whose place it gives: number, name, se_id, address or fingerprint."""
    instance_id: str = ""
    """The one instance-id that may bring it."""
    expires_in_s: int = 86400
    note: str = ""


class TokenView(msgspec.Struct, kw_only=True):
    """A token as stored; its text is not."""

    token_id: str
    status: str
    """`good`, `taken` (its SE waits for approval), `used`, `expired` or `revoked`."""
    image_key_id: str
    rejoin: str
    """se_id whose place it gives, "" where it goes with an image key."""
    instance_id: str
    created_at: int
    expires_at: int
    taken_by: str
    """se_id of who brought it."""
    taken_at: int
    note: str


class TokenCreated(msgspec.Struct, kw_only=True):
    """The one time that a token's text is seen."""

    token: str
    view: TokenView


class Event(msgspec.Struct, kw_only=True):
    """Something an operator may want to know; ids grow by one."""

    id: int
    time: float
    stage: str
    kind: str
    """Dotted name, for example `se.state`, `se.clone`, `enroll.granted`, `enroll.refused`."""
    subject: str
    text: str


class AuditEntry(msgspec.Struct, kw_only=True, frozen=True):
    """One entry of a node's chain; `hash` is SHA-256 over the entry without `hash`, `previous` the hash before it."""

    sequence: int
    time: float
    node: int
    epoch: int
    actor: str
    action: str
    subject: str
    detail: str
    previous: str
    hash: str = ""


class AuditVerdict(msgspec.Struct, kw_only=True):
    """Result of checking a chain."""

    entries: int
    intact: bool
    text: str
    head: str


class RecoveryView(msgspec.Struct, kw_only=True):
    """What a restore left to do; all zero where this controller was never restored. Times are seconds since 1970."""

    is_active: bool = False
    """Whether receipts are taken."""
    epoch: int = 0
    began_at: float = 0.0
    ended_at: float = 0.0
    backup_made_at: float = 0.0
    backup_epoch: int = 0
    numbers_from: int = 0
    waiting: list[str] = []
    """Names of SEs whose receipts hold and that wait for approval."""
    warnings: list[str] = []
    """What can't be known, one sentence each."""


class ReceiptsApproved(msgspec.Struct, kw_only=True):
    """Who was let in, and what is left to be thought of."""

    approved: list[SeSummary]
    warnings: list[str]


class RotationView(msgspec.Struct, kw_only=True):
    """How far a change of root, host key or log-in key got."""

    kind: str
    """`ca`, `host-key` or `login-key`."""
    phase: str
    """`none` or `announced`."""
    version: int
    """Version of the trust document that announced it."""
    began_at: float
    waiting: list[str]
    """Names of SEs that have not seen that version."""
    former_kept: bool
    """Whether the former root's key still signs trust documents."""
    backup_due: bool = False
    """Whether no backup was taken since this change began, without which a restore brings no SE back after it."""


class Drained(msgspec.Struct, kw_only=True):
    """Links that were open when draining began."""

    links: int
