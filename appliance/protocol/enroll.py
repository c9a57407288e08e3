"""Stage enroll: what an SE says on HTTPS 8443, and the table that decides the answer.

    POST /v1/enroll/nonce     NonceAnswer
    POST /v1/enroll/trust     see `protocol.trust`
    POST /v1/enroll           JWS (image key, SE key) over EnrollRequest -> 201 Grant | 202 Pending | Problem
    POST /v1/enroll/refresh   JWS (SE key) over RefreshRequest           -> 200 Grant | 202 Pending | Problem
    POST /v1/enroll/rejoin    JWS (SE's new key) over EnrollRequest      -> 201 Grant | Problem
                              with a rejoin token in it

State is looked up first, by se_id *and* by key; `decide` is the whole table:

    key known under another se_id             refuse CLONED_KEY
    se_id revoked, rejected, quarantined,
    deleted (tombstone)                       refuse, each with its own code
    se_id pending      same key               PENDING again; another key: CONFLICT
    se_id enrolled     same key, no hello yet GRANT_AGAIN (counted once: a lost answer strands nobody)
    se_id enrolled     same key, hello seen   refuse SPENT (the image key is used up for this SE; refresh is the way)
    se_id enrolled     other key              refuse CONFLICT, the existing SE is not touched
    unknown            its image revoked: IMAGE_REVOKED; then the image key's terms, then its policy:
                         open                 GRANT_NEW
                         token                GRANT_NEW with a good token, else that token's refusal
                         approve              PENDING
                         hook                 ASK_HOOK first; then GRANT_NEW, refuse HOOK, or PENDING where it gave
                                              no verdict

`decide_rejoin` is the same for a new key that a rejoin token speaks for:

    key known under another se_id, or se_id
    not known, or of a status as above        refused alike
    se_id pending                             refuse CONFLICT with a good token, there is no place to take yet; else
                                              that token's refusal: who has none learns and changes nothing
    se_id enrolled     same key, no hello yet GRANT_AGAIN, whatever became of the token (a lost answer)
    se_id enrolled     same key, hello seen   refuse SPENT
    se_id enrolled     other key              REPLACE_KEY with a good token, else that token's refusal

The tables know no clock, no store and no signature: the caller verified all signatures before it asks. What an
operator may do to an SE in which status is in `protocol.standing`.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

import msgspec

from appliance.protocol.problem import Problem
from appliance.protocol.seed import Hints
from appliance.protocol.source import is_allowed
from appliance.protocol.trust import Envelope

NONCE_PATH = "/v1/enroll/nonce"
ENROLL_PATH = "/v1/enroll"
REFRESH_PATH = "/v1/enroll/refresh"
REJOIN_PATH = "/v1/enroll/rejoin"
ATTEMPT_HEADER = "appliance-attempt"
"""Request header that names one SE's series of attempts, so `why ATTEMPT` finds an SE that never got in."""

NONCE_LIFE_S = 300
MAX_REQUEST_BYTES = 12 * 1024
MAX_MACS = 32
MAX_FACT_CHARS = 128
MAX_HEADER_BYTES = 8 * 1024
PROTOCOL_HEADER = "appliance-protocol"
"""Header in which either side names its highest protocol number (`protocol.tunnel`); 1 where it is missing."""

_SE_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_ATTEMPT = re.compile(r"[0-9a-f]{16}")


class NonceAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A nonce (opaque), the controller's time in seconds since 1970, and how long the nonce lives."""

    nonce: str
    time: int
    life_s: int = NONCE_LIFE_S


class InstanceFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the VM says about itself. Self-asserted: shown and compared, never trusted."""

    dmi_uuid: str = ""
    instance_id: str = ""
    macs: list[str] = []
    boot_id: str = ""
    image_digest: str = ""


def check_facts(facts: InstanceFacts, agent_version: str) -> list[str]:
    """Returns what is wrong with what a VM says of itself, one sentence each; empty where it holds.

    It is stored and shown: bounded, since anybody with an image key may say it, and printable.
    """
    problems = []
    if len(facts.macs) > MAX_MACS:
        problems.append(f"{len(facts.macs)} MAC addresses, at most {MAX_MACS} are accepted")
    said = (facts.dmi_uuid, facts.instance_id, facts.boot_id, facts.image_digest, agent_version, *facts.macs)
    if any(len(fact) > MAX_FACT_CHARS for fact in said):
        problems.append(f"a fact is longer than {MAX_FACT_CHARS} characters")
    if not all(fact.isprintable() for fact in said):
        problems.append("a fact has characters that can't be printed")
    return problems


class EnrollRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Payload of the two-signature JWS; of the rejoin's one-signature JWS with its token."""

    audience: str
    """The cluster id."""
    nonce: str
    se_id: str
    se_key: str
    """OpenSSH public key line, ssh-ed25519, no comment."""
    host_keys: list[str]
    """The SE's sshd host keys, OpenSSH lines without comment."""
    facts: InstanceFacts
    agent_version: str
    attempt_id: str
    hints: Hints = Hints()
    token: str = ""
    protocol: int = 1
    """The one that both sides speak, since protocol 2."""


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an SE shows to a controller that may not know it any more: restored from an older backup."""

    receipt: Envelope
    """As it came with the grant."""
    se_key: str
    host_keys: list[str]
    facts: InstanceFacts


class RefreshRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Payload of the one-signature JWS by the SE's key."""

    audience: str
    nonce: str
    se_id: str
    agent_version: str
    attempt_id: str
    claim: Claim | None = None


class Grant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """201: what an enrolled SE gets."""

    cluster_id: str
    se_id: str
    name: str
    number: int
    address: str
    trust: Envelope
    receipt: Envelope
    heartbeat_interval_s: float


class Pending(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """202: accepted, waiting for an operator."""

    se_id: str
    fingerprint: str
    retry_after_s: int


class Refusal(NamedTuple):
    """One way to say no. `retry_after_s` 0 means that waiting alone does not help."""

    code: str
    status: int
    title: str
    advice: str
    retry_after_s: int = 0


class Refusals(Refusal, enum.Enum):
    """All refusals of the stage; docs and problem documents are made from this table."""

    MALFORMED = Refusal("ENROLL-001", 400, "The request is malformed", "Use an agent of the controller's version.")
    IMAGE_KEY_UNKNOWN = Refusal(
        "ENROLL-002", 403, "The image key is not known", "Bake the image with an image key of this cluster.", 300
    )
    SIGNATURE = Refusal("ENROLL-003", 403, "A signature does not verify", "Bake the image anew; its key is damaged.")
    AUDIENCE = Refusal(
        "ENROLL-004", 403, "The request is meant for another cluster", "Check the controller address in the seed."
    )
    NONCE_STALE = Refusal("ENROLL-005", 409, "The nonce is stale", "Send again with the nonce given here.", 1)
    NONCE_USED = Refusal("ENROLL-006", 409, "The nonce was used already", "Send again with the nonce given here.", 1)
    IMAGE_KEY_REVOKED = Refusal(
        "ENROLL-007", 403, "The image key was revoked", "Deploy from an image with a current image key.", 600
    )
    IMAGE_KEY_EXPIRED = Refusal(
        "ENROLL-008", 403, "The image key has expired", "Create a new image key and bake a new image.", 600
    )
    IMAGE_KEY_USED_UP = Refusal(
        "ENROLL-009", 403, "The image key has no uses left", "Create a new image key or raise its maximum.", 60
    )
    SOURCE = Refusal(
        "ENROLL-010", 403, "The source address is not allowed for this image key", "Check the key's networks.", 600
    )
    SPENT = Refusal("ENROLL-011", 409, "The image key is spent for this SE", "Use refresh with the SE's own key.")
    CONFLICT = Refusal(
        "ENROLL-012",
        409,
        "The se_id is enrolled with another key",
        "If its VM lost its state: `appliance token create --rejoin SE`.",
        600,
    )
    CLONED_KEY = Refusal(
        "ENROLL-013", 409, "The key is enrolled under another se_id", "Remove the SE's state; it is a copy.", 600
    )
    # These three an operator may undo; the SE must notice soon, for nobody goes to it.
    REVOKED = Refusal("ENROLL-014", 403, "The SE was revoked", "`appliance se reinstate SE` undoes it.", 30)
    REJECTED = Refusal("ENROLL-015", 403, "The SE was rejected", "`appliance se reinstate SE` undoes it.", 30)
    QUARANTINED = Refusal("ENROLL-016", 403, "The SE is in quarantine", "See `appliance why SE` for its twin.", 30)
    DELETED = Refusal(
        "ENROLL-017", 410, "The SE was deleted", "On its VM: `appliance enroll --anew`, with a current seed.", 3600
    )
    KEY_IN_USE = Refusal("ENROLL-018", 403, "The key already has another role", "Make a new key for this SE.")
    RATE = Refusal("ENROLL-019", 429, "Too many requests", "Wait as told; the agent does so by itself.", 2)
    TOO_LARGE = Refusal("ENROLL-020", 413, "The request is too large", "Use an agent of the controller's version.")
    SE_UNKNOWN = Refusal(
        "ENROLL-022",
        404,
        "The SE is not known",
        "Enroll with an image key. If the controller was restored: `appliance controller recovery begin` there.",
        60,
    )
    UNAVAILABLE = Refusal("ENROLL-023", 503, "The controller can't store right now", "See `appliance doctor`.", 5)
    NUMBERS = Refusal("ENROLL-024", 503, "There are no SE numbers left", "Start a second cluster.", 3600)
    TOKEN_MISSING = Refusal(
        "ENROLL-025",
        403,
        "A token is needed beside the image key",
        "`appliance token create` makes one; give it by the VM's seed or `appliance enroll --token -`.",
        60,
    )
    SLOW = Refusal("ENROLL-026", 408, "The request took too long to arrive", "Check the path's packet loss.", 5)
    TOKEN_UNKNOWN = Refusal("ENROLL-027", 403, "The token is not known", "Create one: `appliance token create`.", 60)
    TOKEN_USED = Refusal("ENROLL-028", 403, "The token was used already", "Create one: `appliance token create`.", 60)
    TOKEN_EXPIRED = Refusal("ENROLL-029", 403, "The token has expired", "Create one: `appliance token create`.", 60)
    TOKEN_REVOKED = Refusal("ENROLL-034", 403, "The token was revoked", "Create one: `appliance token create`.", 60)
    TOKEN_BOUND = Refusal(
        "ENROLL-035",
        403,
        "The token is for another image key, instance or SE",
        "`appliance token list` tells what each is for.",
        60,
    )
    PROTOCOL = Refusal(
        "ENROLL-042",
        400,
        "The agent's protocol is not spoken here",
        "Upgrade the older of the two: neighbouring protocol numbers understand each other.",
        60,
    )
    HOOK = Refusal("ENROLL-036", 403, "The enroll hook refused", "Ask who runs the program of `enroll_hook`.", 60)
    RECEIPT = Refusal(
        "ENROLL-037",
        403,
        "The receipt does not hold",
        "It is for another SE, key or cluster, or not older than the controller's restore; enroll the VM anew.",
        60,
    )

    IMAGE_REVOKED = Refusal(
        "ENROLL-039", 403, "The image was revoked", "Deploy from a current image; see `appliance image list`.", 600
    )
    IMAGE_KEY_RATE = Refusal(
        "ENROLL-040",
        429,
        "Too many requests by this image key",
        "Wait as told; the agent does so by itself. If these are not your VMs: `appliance image-key revoke`.",
        1,
    )
    DRAINING = Refusal(
        "ENROLL-038", 503, "The controller admits nobody now", "It is about to stop; the agent tries again.", 10
    )

    def problem(self, *, detail: str = "", nonce: str = "", retry_after_s: int = 0) -> Problem:
        """Returns the problem document of this refusal (RFC 9457); `retry_after_s` 0 takes the table's."""
        return Problem(
            type=f"/problems/{self.value.code}",
            title=self.value.title,
            status=self.value.status,
            code=self.value.code,
            detail=detail,
            advice=self.value.advice,
            nonce=nonce,
            retry_after_s=retry_after_s or self.value.retry_after_s,
        )


class SeStatus(enum.StrEnum):
    """What the store says of an SE; its live state is derived (see `protocol.fleet`)."""

    PENDING = "pending"
    ENROLLED = "enrolled"
    QUARANTINED = "quarantined"
    REJECTED = "rejected"
    REVOKED = "revoked"
    DELETED = "deleted"


class Known(NamedTuple):
    """What the store knows of one SE, as far as the decision needs it."""

    se_id: str
    thumbprint: str
    status: SeStatus
    confirmed: bool
    """Whether a hello of this SE was ever confirmed."""


class Policy(enum.StrEnum):
    """What an image key opens."""

    OPEN = "open"
    TOKEN = "token"  # noqa: S105 - the word, not a secret
    APPROVE = "approve"
    HOOK = "hook"


class ImageKeyTerms(NamedTuple):
    """An image key's terms at this moment. Times are seconds since 1970."""

    policy: Policy
    revoked: bool
    expires_at: int
    max_uses: int
    uses: int
    networks: tuple[str, ...] = ()
    """CIDR; empty allows every source."""


class Hook(enum.Enum):
    """What the hook program says of a newcomer."""

    ALLOW = "allow"
    REFUSE = "refuse"
    SILENT = "no verdict"
    """It failed, or wasn't done in time."""


class Evidence(NamedTuple):
    """What speaks for or against a newcomer beside its signatures."""

    token: Refusals | None = Refusals.TOKEN_MISSING
    """Why its token isn't good (`protocol.token.judge`), None where it is."""
    hook: Hook | None = None
    """None: not asked yet."""
    image_revoked: bool = False
    """The image that it says it is from was revoked. Its own word: a liar names another one."""


class Decision(enum.Enum):
    """What to do with a well-signed request."""

    GRANT_NEW = "grant a new SE"
    GRANT_AGAIN = "send the same grant again"
    REPLACE_KEY = "let the new key take the old one's place"
    PENDING = "wait for approval"
    ASK_HOOK = "ask the hook program, then decide again"
    REFUSE = "refuse"


class Verdict(NamedTuple):
    """A decision, and why where it is a refusal."""

    decision: Decision
    refusal: Refusals | None = None


def _refuse(refusal: Refusals) -> Verdict:
    return Verdict(Decision.REFUSE, refusal)


REFUSED_STATUS = {
    SeStatus.REVOKED: Refusals.REVOKED,
    SeStatus.REJECTED: Refusals.REJECTED,
    SeStatus.QUARANTINED: Refusals.QUARANTINED,
    SeStatus.DELETED: Refusals.DELETED,
}


_BY_HOOK = {
    None: Verdict(Decision.ASK_HOOK),
    Hook.ALLOW: Verdict(Decision.GRANT_NEW),
    Hook.REFUSE: _refuse(Refusals.HOOK),
    Hook.SILENT: Verdict(Decision.PENDING),
}


def decide_unknown(terms: ImageKeyTerms, *, source: str, now: int, evidence: Evidence = Evidence()) -> Verdict:  # noqa: B008 - frozen
    """Decides for an SE nobody has seen: its image, the image key's terms, then its policy."""
    if evidence.image_revoked:
        return _refuse(Refusals.IMAGE_REVOKED)
    if terms.revoked:
        return _refuse(Refusals.IMAGE_KEY_REVOKED)
    if now >= terms.expires_at:
        return _refuse(Refusals.IMAGE_KEY_EXPIRED)
    if terms.uses >= terms.max_uses:
        return _refuse(Refusals.IMAGE_KEY_USED_UP)
    if not is_allowed(source, terms.networks):
        return _refuse(Refusals.SOURCE)
    by_policy = {
        Policy.OPEN: Verdict(Decision.GRANT_NEW),
        Policy.TOKEN: _refuse(evidence.token) if evidence.token else Verdict(Decision.GRANT_NEW),
        Policy.APPROVE: Verdict(Decision.PENDING),
        Policy.HOOK: _BY_HOOK[evidence.hook],
    }
    return by_policy[terms.policy]


def decide(
    se_id: str,
    thumbprint: str,
    *,
    by_id: Known | None,
    by_key: Known | None,
    terms: ImageKeyTerms,
    source: str,
    now: int,
    evidence: Evidence = Evidence(),  # noqa: B008 - frozen
) -> Verdict:
    """The decision table of the module's docstring.

    Args:
        se_id: as the request claims.
        thumbprint: SHA-256 fingerprint of the SE key, whose signature was verified.
        by_id: what is known under `se_id`.
        by_key: what is known under `thumbprint`.
        terms: those of the image key whose signature was verified.
        source: the peer's IP address as text.
        now: the controller's time, seconds since 1970.
        evidence: of token, hook and image.
    """
    if by_key is not None and by_key.se_id != se_id:
        return _refuse(Refusals.CLONED_KEY)
    known = by_id or by_key  # both name this se_id; an index that lost one of them must not enroll it a second time
    if known is None:
        return decide_unknown(terms, source=source, now=now, evidence=evidence)
    if known.status in REFUSED_STATUS:
        return _refuse(REFUSED_STATUS[known.status])
    if known.thumbprint != thumbprint:
        return _refuse(Refusals.CONFLICT)
    if known.status is SeStatus.PENDING:
        return Verdict(Decision.PENDING)
    if known.confirmed:
        return _refuse(Refusals.SPENT)
    return Verdict(Decision.GRANT_AGAIN)


def decide_refresh(known: Known | None) -> Verdict:
    """Decides for a refresh: the SE's key alone, no image key."""
    if known is None:
        return _refuse(Refusals.SE_UNKNOWN)
    if known.status in REFUSED_STATUS:
        return _refuse(REFUSED_STATUS[known.status])
    if known.status is SeStatus.PENDING:
        return Verdict(Decision.PENDING)
    return Verdict(Decision.GRANT_AGAIN)


def decide_rejoin(
    se_id: str, thumbprint: str, *, by_id: Known | None, by_key: Known | None, token: Refusals | None
) -> Verdict:
    """The table for a new key that only a rejoin token speaks for; `token` is why that isn't good, None where it is."""
    if by_key is not None and by_key.se_id != se_id:
        return _refuse(Refusals.CLONED_KEY)
    known = by_id or by_key
    if known is None:
        return _refuse(Refusals.SE_UNKNOWN)
    if known.status in REFUSED_STATUS:
        return _refuse(REFUSED_STATUS[known.status])
    if known.status is SeStatus.PENDING:
        return _refuse(token or Refusals.CONFLICT)
    if known.thumbprint == thumbprint:
        return _refuse(Refusals.SPENT) if known.confirmed else Verdict(Decision.GRANT_AGAIN)
    return _refuse(token) if token else Verdict(Decision.REPLACE_KEY)


def is_se_id(text: str) -> bool:
    """Whether `text` is a random UUID (RFC 9562, version 4) in its one canonical form."""
    return _SE_ID.fullmatch(text) is not None


def is_attempt_id(text: str) -> bool:
    """Whether `text` is a 64-bit attempt id in lower-case hex."""
    return _ATTEMPT.fullmatch(text) is not None
