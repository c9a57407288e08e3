"""What the controller's store holds, and under which keys.

se/<se_id>            SeRecord
key/<thumbprint>      se_id: which SE a key belongs to
number/<number>       se_id, number zero-padded so that a range is in order
number-next           the next SE number; only ever grows
image-key/<id>        ImageKeyRecord
image/<id>            ImageRecord
token/<digest>        TokenRecord
recovery              recovery.RecoveryRecord, after a restore
intent/<id>           intents.Intent: what is being done to files, until its audit entry is written
nonce/<nonce>         "", leased until the nonce would be stale anyway
audit/<node>/<seq>    AuditEntry
audit-head/<node>     hash of the newest entry
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from appliance.errors import StoreError
from appliance.protocol import strict_json
from appliance.protocol.enroll import ImageKeyTerms, InstanceFacts, Known, Policy, SeStatus
from appliance.protocol.token import TokenTerms
from appliance.protocol.tunnel import Tickets

T = TypeVar("T")

SE_PREFIX = "se/"
KEY_PREFIX = "key/"
NUMBER_PREFIX = "number/"
NUMBER_NEXT = "number-next"
IMAGE_KEY_PREFIX = "image-key/"
IMAGE_PREFIX = "image/"
TOKEN_PREFIX = "token/"  # noqa: S105 - where they are kept
NONCE_PREFIX = "nonce/"
INTENT_PREFIX = "intent/"


class SeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One SE. Times are seconds since 1970, 0 where it has not happened."""

    se_id: str
    number: int
    name: str
    labels: dict[str, str]
    se_key: str
    thumbprint: str
    host_keys: list[str]
    image_key_id: str
    status: SeStatus
    enrolled_at: float
    source: str
    facts: InstanceFacts
    agent_version: str
    attempt_id: str = ""
    confirmed_at: float = 0.0
    """First confirmed hello; from then on the image key is spent for this SE."""
    image_key_gone_at: float = 0.0
    """When this SE first said that it destroyed its copies of the image key."""
    seen_facts: InstanceFacts = InstanceFacts()
    """Facts of the newest hello, compared with those of the enrollment: drift."""
    ticket: str = ""
    ticket_pending: str = ""
    ticket_superseded: str = ""
    key_due: bool = False
    """An operator wants this SE to make itself a new key."""
    status_reason: str = ""
    status_at: float = 0.0
    token: str = ""
    """Digest of the token it holds or used, "" for none."""
    key_at: float = 0.0
    """When its key took the place of the one it enrolled with."""
    receipt_epoch: int = 0
    """Of the receipt by which it came back to a restored controller, 0 where it needed none."""
    receipt_fault: str = ""
    """Why no list of receipts approves it, "" where nothing is against that."""

    @property
    def store_key(self) -> str:
        """Where it is stored."""
        return se_key(self.se_id)

    @property
    def key_since(self) -> float:
        """Since when its key is its key."""
        return max(self.enrolled_at, self.key_at)

    @property
    def known(self) -> Known:
        """What the decision table sees."""
        return Known(self.se_id, self.thumbprint, self.status, self.confirmed_at > 0)

    @property
    def tickets(self) -> Tickets:
        """What the take-over table sees."""
        return Tickets(self.ticket, self.ticket_pending, self.ticket_superseded)


class ImageKeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One image key: the public half and its terms."""

    image_key_id: str
    public_key: str
    policy: Policy
    created_at: int
    expires_at: int
    max_uses: int
    uses: int = 0
    networks: tuple[str, ...] = ()
    note: str = ""
    revoked_at: int = 0
    rate_per_s: float = 0.0
    """Requests that it may sign a second, and at once; 0 each: as the settings say."""
    burst: int = 0

    @property
    def store_key(self) -> str:
        """Where it is stored."""
        return image_key_key(self.image_key_id)

    def status(self, now: float) -> str:
        """`active`, `revoked`, `expired` or `used-up`; `now` is seconds since 1970."""
        if self.revoked_at:
            return "revoked"
        if now >= self.expires_at:
            return "expired"
        return "active" if self.is_active(now) else "used-up"

    def is_active(self, now: float) -> bool:
        """Whether somebody may still come by it; `now` is seconds since 1970."""
        return not self.revoked_at and self.expires_at > now and self.uses < self.max_uses

    @property
    def terms(self) -> ImageKeyTerms:
        """What the decision table sees."""
        return ImageKeyTerms(
            policy=self.policy,
            revoked=self.revoked_at > 0,
            expires_at=self.expires_at,
            max_uses=self.max_uses,
            uses=self.uses,
            networks=self.networks,
        )


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One built image, as the report beside it says. Times are seconds since 1970, 0 where it has not happened."""

    image_id: str
    name: str
    image_key_id: str
    added_at: int
    baked_at: int
    files: list[tuple[str, str]]
    """Name and SHA-256 of each file; a build again of other forms adds its own."""
    also: list[str] = []
    """Further ids that SEs of it name."""
    agent_version: str = ""
    agent_digest: str = ""
    system: str = ""
    recipe_digest: str = ""
    revoked_at: int = 0
    reason: str = ""

    @property
    def store_key(self) -> str:
        """Where it is stored."""
        return IMAGE_PREFIX + self.image_id

    @property
    def ids(self) -> list[str]:
        """All ids that SEs of it name."""
        return [self.image_id, *self.also]


class TokenRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One token; its text was seen once, when it was made."""

    digest: str
    created_at: int
    expires_at: int
    image_key_id: str = ""
    """Which image key it goes with; "" for a rejoin."""
    rejoin: str = ""
    """se_id whose place it gives; "" but for a rejoin."""
    instance_id: str = ""
    note: str = ""
    revoked_at: int = 0
    taken_by: str = ""
    """se_id that used it, or that holds it while it waits for approval."""
    taken_at: int = 0

    @property
    def store_key(self) -> str:
        """Where it is stored."""
        return TOKEN_PREFIX + self.digest

    @property
    def terms(self) -> TokenTerms:
        """What `protocol.token.judge` sees."""
        return TokenTerms(
            self.image_key_id, self.rejoin, self.instance_id, self.expires_at, self.revoked_at > 0, bool(self.taken_by)
        )


Record = SeRecord | ImageKeyRecord | ImageRecord | TokenRecord


def se_key(se_id: str) -> str:
    """Store key of an SE."""
    return SE_PREFIX + se_id


def thumbprint_key(thumbprint: str) -> str:
    """Store key of the index from SE key to SE."""
    return KEY_PREFIX + thumbprint


def number_key(number: int) -> str:
    """Store key of the index from number to SE."""
    return f"{NUMBER_PREFIX}{number:08d}"


def image_key_key(image_key_id: str) -> str:
    """Store key of an image key."""
    return IMAGE_KEY_PREFIX + image_key_id


def encode(record: msgspec.Struct) -> bytes:
    """A record as it is stored."""
    return msgspec.json.encode(record)


def decode(raw: bytes, kind: type[T], key: str) -> T:
    """The reverse. Raises `StoreError` naming the key where the value isn't a `kind`."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except strict_json.UNDECODABLE as error:
        raise StoreError(
            f"the store's {key} is no {kind.__name__}: {error}", hint="restore the controller from a backup"
        ) from None
