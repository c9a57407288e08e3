"""Who this SE is, durably: the documents of `paths.se_state` and the order in which they may change.

    identity.json   se_id, key, attempt id and the grant, one document: written without a grant before the first
                    request leaves, and with it before anything uses it. Never removed because of a refusal.
    tickets.json    the link ticket of each node, written before the link is confirmed
    trust.json      the newest trust document (`se.believed`)
    image-key.pem   this SE's own copy of the image key, until the controller says that it is spent

A broken document was set aside by `storage` and is told, never silently replaced. Without tickets a controller treats
the SE as rolled back; without an identity the SE starts anew, which takes an image key.
"""

from __future__ import annotations

import secrets
import threading
import uuid
from pathlib import Path

import msgspec

from appliance.errors import ApplianceError, DocumentBrokenError, StateMachineError, TrustError
from appliance.paths import Paths
from appliance.pki.identity import Identity
from appliance.pki.ssh_keys import parse_public
from appliance.protocol import seed as protocol
from appliance.protocol.enroll import Grant
from appliance.protocol.trust import Envelope
from appliance.protocol.tunnel import ImageKeyCopies
from appliance.runtime import log
from appliance.storage.atomic import make_dir, read_limited, remove_durably, set_aside, write_atomic
from appliance.storage.document import Document

IMAGE_DIRECTORY = Path(protocol.IMAGE_DIRECTORY)
"""Below the root: where an image carries its seed."""

_MAX_KEY_BYTES = 16 * 1024


class IdentityRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`identity.json`."""

    se_id: str
    key: str
    """PKCS #8 PEM, Ed25519; the file is 0600."""
    attempt_id: str
    """Names this SE's attempts to the controller, also across restarts."""
    image_id: str = ""
    """Of the seed that this SE came from; a fact it tells about itself at enroll and in each hello."""
    grant: Grant | None = None
    next_key: str = ""
    """The key that takes the place of `key` once the controller knows it; PKCS #8 PEM."""

    def __repr__(self) -> str:
        return f"IdentityRecord({self.se_id}, grant={self.grant is not None})"


class TicketBook(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`tickets.json`: link ticket by node number."""

    tickets: dict[str, str] = {}


def host_keys(paths: Paths) -> list[str]:
    """Returns this SE's sshd host keys as lines without comment: Ed25519 only, empty while sshd has none."""
    try:
        raw = read_limited(paths.root / "etc/ssh/ssh_host_ed25519_key.pub", max_bytes=_MAX_KEY_BYTES)
        line = " ".join(raw.decode("ascii").split()[:2])
        parse_public(line)
    except (FileNotFoundError, UnicodeDecodeError, ApplianceError):
        return []
    return [line]


class SeState:
    """The SE's durable documents. Thread-safe; one process at a time (root lock)."""

    def __init__(self, paths: Paths) -> None:
        self._log = log.bind("seed")
        self._lock = threading.RLock()
        self.directory = paths.se_state
        make_dir(self.directory)
        self._identity_document = Document(self.directory / "identity.json", IdentityRecord)
        self._ticket_document = Document(self.directory / "tickets.json", TicketBook)
        self.trust_document: Document[Envelope] = Document(self.directory / "trust.json", Envelope)
        self.image_key_path = self.directory / "image-key.pem"
        self.authorized_keys_path = self.directory / "authorized_keys"
        self.set_aside: list[str] = []
        """What was found broken, one sentence each."""
        self._record: IdentityRecord | None = None
        self._identity: Identity | None = None
        self._tickets = TicketBook()
        self._tries_next = False

    def load(self) -> None:
        """Reads identity and tickets; what is broken was set aside and counts as missing.

        Raises:
            DowngradeError: written by a newer version; nothing was changed.
            StorageError: can't be read.
        """
        try:
            self._record = self._identity_document.load()
            self._identity = None if self._record is None else Identity.from_pkcs8(self._record.key.encode())
        except DocumentBrokenError as error:
            self._tell(error)
        except TrustError as error:
            aside = set_aside(self.directory / "identity.json")
            self._record = None
            self._tell(DocumentBrokenError(f"identity.json: {error.message}; it was set aside as {aside}"))
        try:
            self._tickets = self._ticket_document.load() or TicketBook()
        except DocumentBrokenError as error:
            self._tell(error)

    @property
    def record(self) -> IdentityRecord | None:
        """The identity, where there is one."""
        return self._record

    def require(self) -> IdentityRecord:
        """Returns the identity, which is there. Raises `StateMachineError` where it isn't: a defect of ours."""
        if self._record is None:
            raise StateMachineError("this SE has no identity yet")
        return self._record

    @property
    def grant(self) -> Grant | None:
        """The grant, where this SE is enrolled."""
        return None if self._record is None else self._record.grant

    @property
    def identity(self) -> Identity:
        """The SE's key pair; only asked for once there is one."""
        if self._identity is None:
            raise StateMachineError("this SE has no identity yet")
        return self._identity

    def next_identity(self) -> Identity:
        """Returns the key that is to take this one's place; makes and stores it first where there is none yet."""
        with self._lock:
            record = self.require()
            if not record.next_key:
                record = msgspec.structs.replace(record, next_key=Identity.create().pkcs8().reveal().decode())
                self._identity_document.save(record)
                self._record = record
        return Identity.from_pkcs8(record.next_key.encode())

    def promote_key(self, receipt: Envelope | None = None) -> None:
        """The controller knows the next key: it is the key from now on, with its `receipt`; the old one is gone."""
        with self._lock:
            record = self.require()
            if not record.next_key:
                return
            grant = record.grant
            if grant is not None and receipt is not None:
                grant = msgspec.structs.replace(grant, receipt=receipt)
            record = msgspec.structs.replace(record, key=record.next_key, next_key="", grant=grant)
            self._identity_document.save(record)
            self._record, self._identity = record, Identity.from_pkcs8(record.key.encode())
            self._tries_next = False
            self._log.info("this SE has a new key, %s", self._identity.thumbprint)

    def save_receipt(self, receipt: Envelope) -> None:
        """Stores a verified receipt in place of the one that came with the grant. Raises `StorageError`."""
        with self._lock:
            if self.grant is not None:
                self.save_grant(msgspec.structs.replace(self.grant, receipt=receipt))

    def login_identity(self) -> tuple[Identity, bool]:
        """Returns the key to log in with, and whether it is the next one (see `key_refused`)."""
        record = self.require()
        if self._tries_next and record.next_key:
            return Identity.from_pkcs8(record.next_key.encode()), True
        return self.identity, False

    def key_refused(self) -> None:
        """The controller refused the key. Where a power cut left open which of two it knows, the other is tried."""
        self._tries_next = not self._tries_next

    def create(self, *, image_id: str, se_id: str = "") -> None:
        """Makes a key and stores it, before any request is made with it. Raises `StorageError`.

        Args:
            image_id: of the seed.
            se_id: whose place this SE takes by a rejoin; "" makes a new one.
        """
        if self._tickets.tickets:
            self._save_tickets(TicketBook())  # an earlier identity's
        identity = Identity.create()
        record = IdentityRecord(
            se_id=se_id or str(uuid.uuid4()),
            key=identity.pkcs8().reveal().decode(),
            attempt_id=secrets.token_hex(8),
            image_id=image_id,
        )
        # Those of an identity that was lost: with them this SE would look like a restored copy of itself.
        remove_durably(self.directory / "tickets.json")
        self._tickets = TicketBook()
        self._identity_document.save(record)
        self._record, self._identity = record, identity

    def give_up(self) -> None:
        """Sets the identity aside, grant and all: an operator wants another one. Raises `StorageError`."""
        if self._record is not None:
            aside = set_aside(self.directory / "identity.json")
            self._log.warning("the identity of SE %s was set aside as %s, as told", self._record.se_id, aside)
        self._record = self._identity = None

    def save_grant(self, grant: Grant) -> None:
        """Stores the grant with the identity it belongs to, as one document. Raises `StorageError`."""
        with self._lock:
            record = msgspec.structs.replace(self.require(), grant=grant)
            self._identity_document.save(record)
            self._record = record

    def ticket(self, node: int) -> str:
        """Returns the last ticket stored for `node`, "" where there is none."""
        return self._tickets.tickets.get(str(node), "")

    def save_ticket(self, node: int, ticket: str) -> None:
        """Stores a link ticket durably: the link is confirmed only after this returned. Raises `StorageError`."""
        with self._lock:
            self._save_tickets(TicketBook(tickets={**self._tickets.tickets, str(node): ticket}))

    def _save_tickets(self, book: TicketBook) -> None:
        self._ticket_document.save(book)
        self._tickets = book

    def image_key(self) -> Identity | None:
        """Returns this SE's own copy of the image key, None where there is none (any more)."""
        try:
            pem = read_limited(self.image_key_path, max_bytes=_MAX_KEY_BYTES)
        except FileNotFoundError:
            return None
        if not pem.strip(b"\0"):
            return None  # a power cut between overwriting and removing
        try:
            return Identity.from_pkcs8(pem)
        except TrustError as error:
            aside = set_aside(self.image_key_path)
            self._tell(DocumentBrokenError(f"image-key.pem: {error.message}; it was set aside as {aside}"))
            return None

    def keep_image_key(self, key: Identity) -> None:
        """Stores this SE's own copy: the disk it came from may be gone at the next boot. Raises `StorageError`."""
        write_atomic(self.image_key_path, key.pkcs8().reveal(), mode=0o600)

    def scrub_image_key(self, paths: Paths) -> tuple[ImageKeyCopies, list[str]]:
        """Destroys the copies of the image key: this SE's own and the image's, not that of a seed named by a setting.

        Hygiene, no input to a decision: a failure is told and passed over.

        Returns:
            What to tell the controller, and what became of each copy that was there, a clause each.
        """
        copies = ImageKeyCopies.DESTROYED
        told = []
        for path in (self.image_key_path, paths.root / IMAGE_DIRECTORY / protocol.IMAGE_KEY_FILE):
            try:
                if path.exists():
                    remove_durably(path, scrub=True)
                    self._log.info("the image key is spent; its copy %s was destroyed", path)
                    told.append(f"image key {path} destroyed")
            except (ApplianceError, OSError) as error:
                self._log.warning("the spent image key %s could not be destroyed: %s", path, error)
                told.append(f"image key {path} NOT destroyed: {error}")
                copies = ImageKeyCopies.LEFT
        return copies, told

    def _tell(self, error: DocumentBrokenError) -> None:
        self.set_aside.append(error.message)
        self._log.error("%s", error.message, extra={"code": error.code})
