"""The operator API's part about images and the keys they carry: the ledger, and the terms of image keys."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from appliance.controller.events import Events
from appliance.controller.fleet import Fleet
from appliance.controller.images import UNKNOWN, Images
from appliance.controller.init import make_bundle
from appliance.controller.material import Material
from appliance.controller.rate import KeyRates
from appliance.controller.records import ImageKeyRecord, ImageRecord, SeRecord
from appliance.controller.registry import Registry
from appliance.controller.web import Endpoint, ProblemError, Request, simple_problem
from appliance.errors import NotFoundError, UsageError
from appliance.protocol.enroll import Policy
from appliance.protocol.fleet import SeSummary
from appliance.protocol.image import ImageReport
from appliance.protocol.operator import (
    ImageDetail,
    ImageKeyCreated,
    ImageKeyRevoked,
    ImageKeyTermsWish,
    ImageKeyView,
    ImageList,
    ImageRevocation,
    ImageRevoked,
    ImageView,
    Reasoned,
)
from appliance.protocol.source import check_networks

MAX_UNKNOWN = 1000
"""Ids listed that only SEs name: every VM with a seed of its own may have one."""


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    try:
        yield
    except NotFoundError as error:
        raise ProblemError(simple_problem(404, error.code, error.message, advice=error.hint)) from None
    except UsageError as error:
        raise ProblemError(simple_problem(409, error.code, error.message, advice=error.hint)) from None


class ImagesApi:
    """Answers operators. One loop only."""

    def __init__(
        self,
        registry: Registry,
        images: Images,
        fleet: Fleet,
        events: Events,
        *,
        material: Material,
        key_rates: KeyRates,
        has_hook: bool,
        wall: Callable[[], float],
    ) -> None:
        """`has_hook` tells whether the setting `enroll_hook` names a program."""
        self._registry = registry
        self._images = images
        self._fleet = fleet
        self._events = events
        self._material = material
        self._key_rates = key_rates
        self._has_hook = has_hook
        self._wall = wall

    def endpoints(self) -> list[Endpoint]:
        """The table of this part."""
        return [
            Endpoint("GET", "/v1/image-keys", self.keys, "All image keys", {200: list[ImageKeyView]}),
            Endpoint(
                "POST", "/v1/image-keys", self.create_key, "Make an image key", {201: ImageKeyCreated},
                ImageKeyTermsWish, errors=(400,),
            ),
            Endpoint(
                "POST", "/v1/image-keys/{key}/revoke", self.revoke_key, "Revoke an image key",
                {200: ImageKeyRevoked}, Reasoned, errors=(400, 404),
            ),
            Endpoint("GET", "/v1/images", self.images, "The ledger of images", {200: ImageList}),
            Endpoint(
                "POST", "/v1/images", self.add, "Take an image in", {201: ImageView, 200: ImageView}, ImageReport,
                errors=(400, 409),
            ),
            Endpoint("GET", "/v1/images/{image}", self.image, "One image", {200: ImageDetail}, errors=(404, 409)),
            Endpoint(
                "POST", "/v1/images/{image}/revoke", self.revoke, "Revoke an image", {200: ImageRevoked},
                ImageRevocation, errors=(400, 404, 409),
            ),
        ]  # fmt: skip

    # Image keys.

    def _key_view(self, record: ImageKeyRecord) -> ImageKeyView:
        return ImageKeyView(
            image_key_id=record.image_key_id,
            policy=record.policy,
            created_at=record.created_at,
            expires_at=record.expires_at,
            max_uses=record.max_uses,
            uses=record.uses,
            networks=list(record.networks),
            note=record.note,
            status=record.status(self._wall()),
            rate_per_s=record.rate_per_s or self._key_rates.rate_per_s,
            burst=record.burst or self._key_rates.burst,
            limited=self._key_rates.limited[record.image_key_id],
            images=[image.image_id for image in self._images.by_key(record.image_key_id)],
        )

    async def keys(self, _request: Request, _body: None) -> list[ImageKeyView]:
        """All image keys."""
        return [self._key_view(record) for record in self._registry.image_keys()]

    async def create_key(self, request: Request, wish: ImageKeyTermsWish) -> ImageKeyCreated:
        """Makes an image key; its private half is in the answer and nowhere else."""
        faults = []
        if wish.policy is Policy.HOOK and not self._has_hook:
            faults.append("policy 'hook': the setting controller.enroll_hook names no program")
        if not 60 <= wish.expires_in_s <= 10 * 366 * 86400:
            faults.append(f"expires_in_s {wish.expires_in_s}: from a minute to ten years expected")
        if not 1 <= wish.max_uses <= 1_000_000:
            faults.append(f"max_uses {wish.max_uses}: 1 to 1000000 expected")
        if not (wish.rate_per_s == 0 or 0.001 <= wish.rate_per_s <= 1e6):
            faults.append(f"rate_per_s {wish.rate_per_s}: 0.001 to 1000000, or 0 for the settings', expected")
        if not 0 <= wish.burst <= 1_000_000:
            faults.append(f"burst {wish.burst}: 1 to 1000000, or 0 for the settings', expected")
        faults += check_networks(wish.networks)
        if faults:
            detail = "; ".join(faults)
            raise ProblemError(simple_problem(400, "USAGE-001", "The terms don't hold", detail=detail))
        record, identity = await self._registry.create_image_key(wish, actor=request.state.actor)
        bundle = make_bundle(self._material, record, identity)
        return ImageKeyCreated(key=self._key_view(record), bundle=bundle)

    async def revoke_key(self, request: Request, body: Reasoned) -> ImageKeyRevoked:
        """Revokes an image key and names the SEs that came by it, and the images that carry it."""
        key_id = request.path_params["key"]
        with _refused():
            record = await self._registry.revoke_image_key(key_id, actor=request.state.actor, reason=body.reason)
        named = self._images.named()
        return ImageKeyRevoked(
            key=self._key_view(record),
            ses=self._summaries(se for se in self._registry.ses() if se.image_key_id == key_id),
            images=[self._view(image, named) for image in self._images.by_key(key_id)],
        )

    # Images.

    def _summaries(self, ses: Iterable[SeRecord]) -> list[SeSummary]:
        return [self._fleet.summary(se) for se in ses]

    def _view(self, record: ImageRecord, named: dict[str, list[SeRecord]]) -> ImageView:
        key = self._registry.image_key(record.image_key_id)
        return ImageView(
            image_id=record.image_id,
            name=record.name,
            status=self._images.status(record),
            image_key_id=record.image_key_id,
            ses=len(named.get(record.image_id, ())),
            key_uses=key.uses if key else 0,
            key_max_uses=key.max_uses if key else 0,
            key_expires_at=key.expires_at if key else 0,
            baked_at=record.baked_at,
            added_at=record.added_at,
            revoked_at=record.revoked_at,
            reason=record.reason,
            agent_version=record.agent_version,
            agent_digest=record.agent_digest,
            system=record.system,
            recipe_digest=record.recipe_digest,
            also=record.also,
            files=record.files,
        )

    def _unknown(self, said: str, ses: list[SeRecord]) -> ImageView:
        keys = ", ".join(sorted({se.image_key_id for se in ses}))
        return ImageView(image_id=said, name="", status=UNKNOWN, image_key_id=keys, ses=len(ses))

    async def images(self, _request: Request, _body: None) -> ImageList:
        """The ledger, oldest first, and the ids most SEs name that aren't in it."""
        named = self._images.named()
        unknown = [(said, ses) for said, ses in named.items() if self._registry.image(said) is None]
        unknown.sort(key=lambda entry: (-len(entry[1]), entry[0]))
        return ImageList(
            images=[self._view(record, named) for record in self._registry.images()],
            unknown=[self._unknown(said, ses) for said, ses in unknown[:MAX_UNKNOWN]],
        )

    async def image(self, request: Request, _body: None) -> ImageDetail:
        """One image with the SEs that name it; also one that only SEs know of."""
        text, named = request.path_params["image"], self._images.named()
        if self._registry.image(text) is None and text in named:
            return ImageDetail(image=self._unknown(text, named[text]), ses=self._summaries(named[text]))
        with _refused():
            record = self._images.find(text)
        return ImageDetail(image=self._view(record, named), ses=self._summaries(named.get(record.image_id, ())))

    async def add(self, request: Request, report: ImageReport) -> tuple[int, ImageView]:
        """Takes an image in by the report that its builder wrote."""
        with _refused():
            record, is_new, changed = await self._images.add(report, actor=request.state.actor)
        if changed:
            text = f"image {record.name} ({record.image_id}) is in the ledger, image key {record.image_key_id}"
            self._events.emit("seed", "image.added", record.image_id, text)
        return 201 if is_new else 200, self._view(record, self._images.named())

    async def revoke(self, request: Request, body: ImageRevocation) -> ImageRevoked:
        """Revokes an image, names its SEs, and says what became of its image key."""
        with _refused():
            done = await self._images.revoke(
                request.path_params["image"], key=body.key, actor=request.state.actor, reason=body.reason
            )
        record, named = done.record, self._images.named()
        ses = named.get(record.image_id, [])
        if done.changed or done.key_revoked:
            what = "revoked with it" if done.key_revoked else "left as it is"
            text = f"image {record.name} ({record.image_id}) is revoked, its image key {record.image_key_id} {what}"
            self._events.emit("seed", "image.revoked", record.image_id, text + (f": {body.reason}" * bool(body.reason)))
        told = {se.se_id for se in ses}
        by_key = (se for se in self._registry.ses() if se.image_key_id == record.image_key_id and se.se_id not in told)
        return ImageRevoked(
            image=self._view(record, named),
            key_revoked=done.key_revoked,
            others=[self._view(one, named) for one in done.others],
            ses=self._summaries(ses),
            by_key=self._summaries(by_key),
        )
