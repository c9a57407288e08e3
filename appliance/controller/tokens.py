"""Making, listing and revoking tokens. A token's text is in one answer and nowhere else; its digest is what is kept.

Ended tokens (used, expired, revoked) are forgotten `KEPT_S` later: a token that isn't known is refused just as well.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import msgspec

from appliance.controller.records import SeRecord, TokenRecord
from appliance.controller.registry import Registry
from appliance.errors import NotFoundError, UsageError
from appliance.protocol import token as said
from appliance.protocol.enroll import Policy, SeStatus

KEPT_S = 90 * 86400
MAX_FORGOTTEN_AT_ONCE = 50
MIN_LIFE_S, MAX_LIFE_S = 60, 366 * 86400


class Tokens:
    """The tokens of a cluster. One loop only."""

    def __init__(self, registry: Registry, *, wall: Callable[[], float]) -> None:
        self._registry = registry
        self._wall = wall

    async def create(
        self,
        *,
        image_key_id: str,
        rejoin: SeRecord | None,
        instance_id: str,
        expires_in_s: int,
        note: str,
        actor: str,
    ) -> tuple[TokenRecord, str]:
        """Makes a token, for an image key or for the SE `rejoin`. Returns its record and its text.

        Args:
            image_key_id: "" takes the one active image key of the policy `token`.
            rejoin: whose place it gives.
            instance_id: the one instance-id that may bring it, "" for any.
            expires_in_s: its life, seconds.
            note: what it is for.
            actor: who makes it.

        Raises:
            UsageError: the terms don't hold.
            NotFoundError: there is no such image key.
        """
        faults = []
        if not MIN_LIFE_S <= expires_in_s <= MAX_LIFE_S:
            faults.append(f"expires_in_s {expires_in_s}: from a minute to a year expected")
        if len(instance_id) > 128 or len(note) > 256:
            faults.append("an instance-id of at most 128 and a note of at most 256 characters expected")
        if rejoin is not None and image_key_id:
            faults.append("a token is for an image key or for a rejoin, not for both")
        if rejoin is not None and rejoin.status is not SeStatus.ENROLLED:
            faults.append(f"{rejoin.name} is {rejoin.status.value}; only an enrolled SE has a place to take")
        if faults:
            raise UsageError("; ".join(faults))
        if rejoin is None:
            image_key_id = self._image_key(image_key_id)
        secret, now = secrets.token_bytes(said.RANDOM_BYTES), int(self._wall())
        text = said.compose(secret, rejoin=rejoin.se_id if rejoin else "")
        record = TokenRecord(
            digest=said.digest(text),
            created_at=now,
            expires_at=now + expires_in_s,
            image_key_id=image_key_id,
            rejoin=rejoin.se_id if rejoin else "",
            instance_id=instance_id,
            note=note,
        )
        whom = f"rejoin of {rejoin.se_id}" if rejoin else f"image key {image_key_id}"
        bound = f", instance-id {instance_id}" if instance_id else ""
        async with self._registry.turn():
            await self._registry.commit(
                record, actor=actor, action="token.created", subject=said.token_id(record.digest),
                detail=f"{whom}{bound}, expires at {record.expires_at}",
            )  # fmt: skip
        return record, text

    def _image_key(self, image_key_id: str) -> str:
        if not image_key_id:
            now = self._wall()
            found = [
                key.image_key_id
                for key in self._registry.image_keys()
                if key.policy is Policy.TOKEN
                and not key.revoked_at
                and key.expires_at > now
                and key.uses < key.max_uses
            ]
            if len(found) != 1:
                raise UsageError(
                    f"{len(found)} active image keys have the policy 'token'"
                    + (f": {', '.join(found)}" if found else ""),
                    hint="name one, or make one: `appliance image-key create --policy token`",
                )
            return found[0]
        key = self._registry.image_key(image_key_id)
        if key is None:
            raise NotFoundError(f"no image key {image_key_id!r} is known", hint="see `appliance image-key list`")
        if key.policy is Policy.OPEN:
            raise UsageError(
                f"the image key {image_key_id} is open: it asks for no token",
                hint="`appliance image-key create --policy token` makes one that does",
            )
        return image_key_id

    def find(self, text: str) -> TokenRecord:
        """Finds a token by its id. Raises `NotFoundError`."""
        for record in self._registry.tokens():
            if text == said.token_id(record.digest):
                return record
        raise NotFoundError("no such token is known", hint="see `appliance token list`")

    async def revoke(self, digest: str, *, actor: str, reason: str) -> TokenRecord:
        """Revokes a token; an SE that came by it is left alone. Revoking twice changes nothing."""
        async with self._registry.turn():
            record = self._registry.token(digest)
            if record is None:
                raise NotFoundError("no such token is known", hint="see `appliance token list`")
            if record.revoked_at:
                return record
            revoked = msgspec.structs.replace(record, revoked_at=int(self._wall()))
            await self._registry.commit(
                revoked, actor=actor, action="token.revoked", subject=said.token_id(digest), detail=reason
            )
            return revoked

    def status(self, record: TokenRecord) -> str:
        """`good`, `taken` (by an SE that waits for approval), `used`, `expired` or `revoked`."""
        if record.taken_by:
            holder = self._registry.se(record.taken_by)
            return "taken" if holder is not None and holder.status is SeStatus.PENDING else "used"
        if record.revoked_at:
            return "revoked"
        return "expired" if self._wall() >= record.expires_at else "good"

    async def forget_ended(self) -> int:
        """Forgets some of the tokens that ended long ago. Returns how many. Raises `StoreError`."""
        line = self._wall() - KEPT_S
        async with self._registry.turn():
            ended = [
                record
                for record in self._registry.tokens()
                if max(record.expires_at, record.taken_at, record.revoked_at) < line and self.status(record) != "taken"
            ][:MAX_FORGOTTEN_AT_ONCE]
            if ended:
                await self._registry.forget_tokens(ended)
        return len(ended)
