"""Stage tunnel: the link's life, what is said over it, and the rules of the watchdog and of take-over.

The channel API is HTTP/1.1 on `direct-tcpip` channels to `channel:80`, served inside the gateway; the link is the
identity:

    POST /v1/hello       Hello -> HelloAnswer (a link ticket, stored durably by the SE before it confirms)
    POST /v1/confirm     Confirm -> ConfirmAnswer
    POST /v1/heartbeat   Heartbeat -> HeartbeatAnswer
    POST /v1/rotate-key  RotateKey -> RotateAnswer (only after a heartbeat's answer asked for it)

A link's life on the SE (`advance`):

    IDLE      --dial-->       DIALING
    DIALING   --authenticated--> GREETING   (TCP, key exchange, user authentication)
    GREETING  --confirmed-->  LINKED        (hello, ticket stored, confirm)
    LINKED    --answered-->   UP            (first heartbeat answered)
    UP        --answered-->   UP
    GREETING  --quarantined--> QUARANTINED
    QUARANTINED --answered--> QUARANTINED  (may ping, nothing else)
    any but IDLE --lost-->    IDLE

Whoever comes with an SE's key while an older link is there is judged by its ticket (`judge_newcomer`), see DESIGN
section 8.

Protocol numbers (`agree`). Both sides speak `PROTOCOL_NUMBER` and the one before it; hello says the agent's, its answer
the lower of the two, and from then on nothing is said that the lower one doesn't know. Hello itself never changes: it
is read before anything is agreed on. What each number added:

    1    everything above
    2    Heartbeat.open_doors, .image_key; EnrollRequest.protocol
"""

from __future__ import annotations

import enum
import re
from typing import Annotated, NamedTuple

import msgspec

from appliance.errors import StateMachineError
from appliance.protocol.enroll import InstanceFacts
from appliance.protocol.trust import Envelope

PROTOCOL_NUMBER = 2
OLDEST_PROTOCOL_NUMBER = 1
SELF_TEST_SINCE = 2
IMAGE_KEY_TOLD_SINCE = 2

CHANNEL_HOST = "channel"
CHANNEL_PORT = 80
"""Destination of the `direct-tcpip` channel that carries the channel API."""

SERVICE_PORT = 1
"""Destination port of channels to a named controller service: the name alone says which."""

HELLO_PATH = "/v1/hello"
CONFIRM_PATH = "/v1/confirm"
HEARTBEAT_PATH = "/v1/heartbeat"
ROTATE_PATH = "/v1/rotate-key"

MAX_BODY_BYTES = 256 * 1024
MAX_HEADER_BYTES = 4 * 1024
MAX_SAMPLES = 64
"""Samples of telemetry in one heartbeat: nobody else is answered while they are read."""

KEX = ("mlkem768x25519-sha256",)
KEX_FALLBACK = ("curve25519-sha256", "curve25519-sha256@libssh.org")
CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com")

UNKNOWN_TICKET = "unknown"
"""Stands for a current ticket that a restored controller can't know; never handed out."""
MAX_AUDIT_HEADS = 4

DEADLINE_S = 2.0
"""How long an answer to a ping may take."""
LARGE_FLEET = 2000
"""SEs above which the heartbeat interval doubles."""
STEADY_AFTER_S = 30.0
"""A link that lived this long resets the back-off."""
MAX_SLOT_S = 60.0
"""The latest that a gateway may ask an SE to come back: nobody proved anything yet when it does."""
_SLOT = re.compile(rb"appliance-slot: ([0-9]{1,5}) ms\r\n")


class Door(enum.StrEnum):
    """What an SE tries with its own key before it calls itself up, and must be refused (`se.self_test`)."""

    SESSION = "session"
    SHELL = "shell"
    EXEC = "exec"
    SFTP = "sftp"
    AGENT = "agent forwarding"
    X11 = "X11 forwarding"
    CONNECT = "foreign destination"
    LISTEN = "foreign listen address"


SELF_TEST_CHANNEL = ("127.0.0.1", 22)
"""Where the self-test wants a channel to: the controller's own machine."""
SELF_TEST_REFUSALS = frozenset({"session", "channel", "forward"})
"""Kinds of refusals that one self-test causes, each once: sessions carry shell, exec, sftp, agent and X11."""


def parse_number(text: str) -> int:
    """Returns the protocol number in a header, 1 where there is none, 0 where it is no number."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else (0 if text else 1)


def agree(theirs: int) -> int | None:
    """Returns the protocol number to speak with a peer that speaks `theirs`, None where there is none.

    Args:
        theirs: the highest one the peer speaks; it speaks the one before it, too.
    """
    spoken = min(theirs, PROTOCOL_NUMBER)
    return spoken if spoken >= max(theirs - 1, OLDEST_PROTOCOL_NUMBER) else None


def slot_line(wait_s: float) -> bytes:
    """What a gateway that is too busy says in place of its version, before it hangs up (RFC 4253 section 4.2 lets a
    server send other lines first): the SE's turn is in `wait_s` seconds."""
    return b"appliance-slot: %d ms\r\n" % round(min(max(wait_s, 0.0), MAX_SLOT_S) * 1000)


def read_slot(received: bytes) -> float | None:
    """Returns after how many seconds to come back where a gateway's first bytes say so, else None."""
    found = _SLOT.fullmatch(received)
    return min(int(found[1]) / 1000, MAX_SLOT_S) if found else None


class ImageKeyCopies(enum.StrEnum):
    """What became of an SE's copies of its image key, once that was spent."""

    UNTOLD = ""
    DESTROYED = "destroyed"
    LEFT = "left"
    """One could not be destroyed; the SE's log says why."""


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """First request on a link."""

    protocol: int
    agent_version: str
    facts: InstanceFacts
    ticket: str
    """The last link ticket the SE confirmed for this node, or "" where it has none."""
    trust_version: int
    time: float
    """The SE's wall clock, seconds since 1970."""
    host_keys: list[str]
    links: int = 0
    """How many links this process made before this one: tells a restart from a reconnect."""
    audit_heads: list[Envelope] = []
    """The newest of this node, one for each epoch, that the SE keeps as a witness."""
    wants_receipt: bool = False
    """The receipt that the SE has is for another key, or signed by who may not count any more (`se.receipt`)."""


class HelloAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Answer to hello."""

    protocol: int
    ticket: str
    quarantined: bool
    reason: str
    heartbeat_interval_s: float
    time: float
    node: int
    reverse_address: str
    reverse_port: int
    trust: Envelope | None = None
    """Only where the SE's is older."""
    audit_head: Envelope | None = None
    """For the SE to keep (`protocol.trust.AuditHead`)."""
    receipt: Envelope | None = None
    """Only where the SE wants one."""


class Confirm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The SE stored `ticket` durably."""

    ticket: str


class ConfirmAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`spent`: the controller has stored durably that this SE's image key is used up; the SE may destroy its copy."""

    spent: bool


class Heartbeat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Ping, and every n-th time telemetry."""

    sequence: int
    time: float
    rtt_s: float = 0.0
    """Round trip of the heartbeat before this one; 0 where there is none yet."""
    telemetry: Annotated[list[str], msgspec.Meta(max_length=MAX_SAMPLES)] = []
    """Encoded samples (see `protocol.telemetry`), oldest first."""
    spool_bytes: int = 0
    spool_dropped: int = 0
    trust_version: int = 0
    open_doors: Annotated[list[Door], msgspec.Meta(max_length=len(Door))] = []
    """What the controller granted in the self-test of this link although it must not. Since protocol 2."""
    image_key: ImageKeyCopies = ImageKeyCopies.UNTOLD
    """Told with the first heartbeat of a link. Since protocol 2."""


class HeartbeatAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Pong. `accepted` samples of this request are kept by the controller and may leave the spool."""

    sequence: int
    interval_s: float
    accepted: int = 0
    trust: Envelope | None = None
    audit_head: Envelope | None = None
    """Once a link for each newer one."""
    rotate_key: bool = False
    """The SE is to make itself a new key and send it with `RotateKey`."""


class RotateKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An SE's new key, sent over a link that the old one opened. The SE stored it durably before.

    With the key that counts already it changes nothing, and asks for that key's receipt as it is signed now.
    """

    se_key: str
    """OpenSSH public key line, ssh-ed25519, no comment."""
    proof: str
    """base64url signature by the new key over `rotation_statement`: the SE has its private half."""


class RotateAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """From now on only the key with this fingerprint logs in."""

    thumbprint: str
    receipt: Envelope | None = None
    """In place of the one that came with the grant, which names the old key."""


def rotation_statement(cluster_id: str, se_id: str, se_key: str) -> bytes:
    """What the proof of a key rotation signs: good for this cluster, SE and key alone."""
    return f"appliance rotate-key v1\n{cluster_id}\n{se_id}\n{se_key}".encode()


class LinkState(enum.StrEnum):
    """Where a link is."""

    IDLE = "idle"
    DIALING = "dialing"
    GREETING = "greeting"
    LINKED = "linked"
    UP = "up"
    QUARANTINED = "quarantined"


class LinkEvent(enum.StrEnum):
    """What happens to a link."""

    DIAL = "dial"
    AUTHENTICATED = "authenticated"
    CONFIRMED = "confirmed"
    ANSWERED = "answered"
    QUARANTINED = "quarantined"
    LOST = "lost"


_MOVES = {
    (LinkState.IDLE, LinkEvent.DIAL): LinkState.DIALING,
    (LinkState.DIALING, LinkEvent.AUTHENTICATED): LinkState.GREETING,
    (LinkState.GREETING, LinkEvent.CONFIRMED): LinkState.LINKED,
    (LinkState.GREETING, LinkEvent.QUARANTINED): LinkState.QUARANTINED,
    (LinkState.LINKED, LinkEvent.ANSWERED): LinkState.UP,
    (LinkState.UP, LinkEvent.ANSWERED): LinkState.UP,
    (LinkState.QUARANTINED, LinkEvent.ANSWERED): LinkState.QUARANTINED,
    (LinkState.DIALING, LinkEvent.LOST): LinkState.IDLE,
    (LinkState.GREETING, LinkEvent.LOST): LinkState.IDLE,
    (LinkState.LINKED, LinkEvent.LOST): LinkState.IDLE,
    (LinkState.UP, LinkEvent.LOST): LinkState.IDLE,
    (LinkState.QUARANTINED, LinkEvent.LOST): LinkState.IDLE,
}


def advance(state: LinkState, event: LinkEvent) -> LinkState:
    """Returns the state after `event`. Raises `StateMachineError` for a move that isn't in the table."""
    try:
        return _MOVES[state, event]
    except KeyError:
        raise StateMachineError(f"link: {event.value!r} can't happen in state {state.value!r}") from None


class Newcomer(enum.Enum):
    """What happens to a link that comes with an SE's key."""

    ADMIT = "admit, close an older link"
    ROLLED_BACK = "admit, the SE came back with an older ticket"
    QUARANTINE = "quarantine, a clone"


class Tickets(NamedTuple):
    """The tickets of one SE at one node."""

    current: str = ""
    pending: str = ""
    """Handed out in the last hello, not confirmed yet: as good as current, for the SE may have stored it."""
    superseded: str = ""
    """The ticket that was current before the SE came back with an older one: whoever shows it is the original's
    twin."""


def is_current(tickets: Tickets, ticket: str) -> bool:
    """Whether `ticket` proves the newest state of this SE. Where none was ever confirmed, none is expected; where a
    controller was restored from a backup, or a quarantine released, the first one that comes counts."""
    if tickets.current == UNKNOWN_TICKET:
        return True
    if not tickets.current:
        return ticket in {"", tickets.pending}
    return ticket in {tickets.current, tickets.pending} and ticket != ""


def judge_newcomer(tickets: Tickets, ticket: str, *, older_link_answers: bool) -> Newcomer:
    """The take-over table.

        ticket          an older link answers a ping   verdict
        superseded      -                              QUARANTINE: the twin of an SE that came back with an older ticket
        any other       yes                            QUARANTINE: one SE never has two living links to one node
        current         no                             ADMIT; a dead older link is closed
        older, or none  no                             ROLLED_BACK: admitted and told

    An SE closes a link before it dials again, so an older link that still answers belongs to somebody else, whatever
    the newcomer shows: a copy of a running SE's disk has the current ticket (docs/adr/0007).

    Args:
        tickets: what the controller knows.
        ticket: what the newcomer shows.
        older_link_answers: whether a link of the same SE exists and answered a ping within `DEADLINE_S`.
    """
    if tickets.superseded and ticket == tickets.superseded:
        return Newcomer.QUARANTINE
    if older_link_answers:
        return Newcomer.QUARANTINE
    return Newcomer.ADMIT if is_current(tickets, ticket) else Newcomer.ROLLED_BACK


def heartbeat_interval(fleet_size: int, base_s: float) -> float:
    """The interval that hello hands out: `base_s` up to LARGE_FLEET SEs, twice that above."""
    return base_s if fleet_size <= LARGE_FLEET else base_s * 2


class Watchdog:
    """Decides when to ping and when a peer is dead. Times are monotonic seconds, given by the caller.

    A ping goes out `interval_s` after the last one; without an answer or any other byte from the peer within
    `deadline_s` a second goes out at once, and after another `deadline_s` the peer is dead: at the latest
    `interval_s + 2 * deadline_s` after it froze.
    """

    def __init__(self, *, interval_s: float, deadline_s: float = DEADLINE_S, now: float) -> None:
        self.interval_s = interval_s
        self.deadline_s = deadline_s
        self._pinged_at = now - interval_s
        self._open = 0

    def pinged(self, now: float) -> None:
        """A ping goes out: told before it is sent, or its answer could seem to come before it."""
        self._pinged_at = now
        self._open += 1

    def alive(self, at: float) -> None:
        """A byte from the peer arrived at `at`; one from before the newest ping says nothing."""
        if at >= self._pinged_at:
            self._open = 0

    def next_at(self) -> float:
        """When to look again."""
        return self._pinged_at + (self.deadline_s if self._open else self.interval_s)

    def should_ping(self, now: float) -> bool:
        """Whether a ping is due: the interval is over, or the first ping's deadline is."""
        return self._open < 2 and now >= self.next_at()

    def is_dead(self, now: float) -> bool:
        """Whether two pings in a row went without any sign of life."""
        return self._open >= 2 and now >= self.next_at()
