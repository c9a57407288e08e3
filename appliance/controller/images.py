"""The ledger of built images: which there are, who says to be from which, and how one is revoked.

An image is known by its report (`protocol.image`), which an operator adds; SEs name it when they enroll. That name is
an SE's own word, so it bars only who tells the truth. What really opens the door is the image key, which is verified.
Revoking an image therefore revokes its key as well, where no other live image carries it; where one does, the operator
says what becomes of the key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple, TypeVar

import msgspec

from appliance.controller.records import ImageRecord, SeRecord
from appliance.controller.registry import Registry
from appliance.errors import NotFoundError, UsageError
from appliance.protocol.image import ImageReport, check_report

T = TypeVar("T")

MAX_FILES = 128
"""Of one image, built again and again."""
UNKNOWN = "unknown"


class Added(NamedTuple):
    """An image's record, and whether this made or changed it."""

    record: ImageRecord
    is_new: bool
    changed: bool


class Revocation(NamedTuple):
    """What revoking an image did."""

    record: ImageRecord
    changed: bool
    key_revoked: bool
    others: list[ImageRecord]
    """Live images with the same image key."""


class Images:
    """The images of a cluster. One loop only."""

    def __init__(self, registry: Registry, *, cluster_id: str, wall: Callable[[], float]) -> None:
        self._registry = registry
        self._cluster_id = cluster_id
        self._wall = wall

    # Looking up.

    def find(self, text: str) -> ImageRecord:
        """Finds an image by an id that its SEs name, by its name, or by the SHA-256 of one of its files.

        Raises:
            NotFoundError: nothing fits.
            UsageError: the name fits several.
        """
        if (record := self._registry.image(text)) is not None:
            return record
        images = self._registry.images()
        digest = text.lower()
        found = [one for one in images if one.name == text or any(sha256 == digest for _, sha256 in one.files)]
        if not found:
            raise NotFoundError(f"no image {text!r} is in the ledger", hint="see `appliance image list`")
        if len(found) > 1:
            ids = ", ".join(one.image_id for one in found)
            raise UsageError(f"{len(found)} images fit {text!r}", hint=f"use one of the ids {ids}")
        return found[0]

    def status(self, record: ImageRecord) -> str:
        """`live`, `revoked`, or what keeps its image key from letting anybody in."""
        if record.revoked_at:
            return "revoked"
        key = self._registry.image_key(record.image_key_id)
        status = key.status(self._wall()) if key is not None else UNKNOWN
        return "live" if status == "active" else f"key {status}"

    def by_key(self, image_key_id: str) -> list[ImageRecord]:
        """The images that carry an image key."""
        return [one for one in self._registry.images() if one.image_key_id == image_key_id]

    def named(self) -> dict[str, list[SeRecord]]:
        """Image id, or what an SE names that the ledger doesn't have, to the SEs that name it."""
        found: dict[str, list[SeRecord]] = {}
        for se in self._registry.ses():
            if said := se.facts.image_digest:
                record = self._registry.image(said)
                found.setdefault(record.image_id if record else said, []).append(se)
        return found

    # Changing.

    async def add(self, report: ImageReport, *, actor: str) -> Added:
        """Takes an image in; files that the ledger doesn't have of it are added to those it has.

        Raises:
            UsageError: the report doesn't hold, or not with what is known.
            StoreError: nothing was stored.
        """
        problems = check_report(report)
        if not problems and report.cluster_id != self._cluster_id:
            problems.append(f"it is of the cluster {report.cluster_id[:64]!r}, this one is {self._cluster_id!r}")
        if problems:
            raise UsageError("the report of the image doesn't hold: " + "; ".join(problems))
        async with self._registry.turn():
            known = self._known(report)
            named = list(report.files.items())
            record = ImageRecord(
                image_id=report.image_id,
                name=report.name,
                image_key_id=report.image_key_id,
                added_at=known.added_at if known else int(self._wall()),
                baked_at=report.baked_at,
                files=_united(known.files, named) if known else named,
                also=_united(known.also, report.also) if known else report.also,
                agent_version=report.agent_version,
                agent_digest=report.agent_digest,
                system=report.system,
                recipe_digest=report.recipe_digest,
            )
            if len(record.files) > MAX_FILES:
                raise UsageError(f"the image {record.image_id} has {len(record.files)} files, at most {MAX_FILES} fit")
            if record == known:
                return Added(known, is_new=False, changed=False)
            digests = ", ".join(f"{name} {sha256}" for name, sha256 in named)
            await self._registry.commit(
                record, actor=actor, action="image.added", subject=record.image_id,
                detail=f"{record.name}, image key {record.image_key_id}: {digests}",
            )  # fmt: skip
        return Added(record, is_new=known is None, changed=True)

    def _known(self, report: ImageReport) -> ImageRecord | None:
        if self._registry.image_key(report.image_key_id) is None:
            raise UsageError(
                f"the image key {report.image_key_id} is not known: nobody can enroll by this image",
                hint="`appliance image-key list` names the keys of this cluster",
            )
        found = {one.image_id: one for name in report.ids if (one := self._registry.image(name)) is not None}
        known = found.pop(report.image_id, None)
        if found:
            raise UsageError(f"its id {', '.join(report.also)} belongs to the image {', '.join(found)} already")
        if known is not None and known.revoked_at:
            raise UsageError(
                f"the image {known.image_id} was revoked", hint="bake another one, with a current image key"
            )
        if known is not None and known.image_key_id != report.image_key_id:
            raise UsageError(f"the image {known.image_id} carries {known.image_key_id}, not {report.image_key_id}")
        return known

    async def revoke(
        self, image_id: str, *, key: Literal["ask", "revoke", "keep"], actor: str, reason: str
    ) -> Revocation:
        """Revokes an image, and its image key where nothing else needs it or `key` says so; SEs are left alone.

        The key goes first: whoever is cut off between the two has the stronger of them, and does it again.

        Raises:
            NotFoundError: there is no such image.
            UsageError: other live images carry its key, and `key` doesn't say what becomes of that.
            StoreError: as `Registry.commit`.
        """
        async with self._registry.turn():
            record = self.find(image_id)
            image_key = self._registry.image_key(record.image_key_id)
            alike = self.by_key(record.image_key_id)
            others = [one for one in alike if one.image_id != record.image_id and not one.revoked_at]
            is_key_live = image_key is not None and not image_key.revoked_at
            if key == "ask" and is_key_live and others and not record.revoked_at:
                names = ", ".join(f"{one.name} ({one.image_id})" for one in others)
                raise UsageError(
                    f"the image key {record.image_key_id} is in other live images too: {names}",
                    hint="--key revokes it, and no SE of any of them gets in any more; --keep-key leaves the door open "
                    "to whoever has this image and names another one. Nothing was changed",
                )
            revokes_key = is_key_live and (key == "revoke" or (key == "ask" and not others))
            if revokes_key:
                await self._registry.revoke_key_in_turn(
                    record.image_key_id, actor=actor, reason=f"with the image {record.image_id}: {reason}"
                )
            if record.revoked_at:
                return Revocation(record, changed=False, key_revoked=revokes_key, others=others)
            revoked = msgspec.structs.replace(record, revoked_at=int(self._wall()), reason=reason)
            detail = f"image key {record.image_key_id} {'revoked with it' if revokes_key else 'left as it is'}"
            await self._registry.commit(
                revoked, actor=actor, action="image.revoked", subject=record.image_id,
                detail=f"{detail}: {reason}" if reason else detail,
            )  # fmt: skip
        return Revocation(revoked, changed=True, key_revoked=revokes_key, others=others)


def _united(known: Iterable[T], more: Iterable[T]) -> list[T]:
    return list(dict.fromkeys([*known, *more]))
