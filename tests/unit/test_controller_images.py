"""The ledger of images on a real store: taking in, finding, revoking, and what a revoked one keeps out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from controller_parts import Book, request
from image_reports import report

from appliance.controller import records
from appliance.controller.images import MAX_FILES, Images
from appliance.controller.records import ImageKeyRecord, ImageRecord, SeRecord
from appliance.controller.store.port import Put
from appliance.errors import NotFoundError, StoreError, UsageError
from appliance.protocol.enroll import Decision, InstanceFacts, Refusals
from appliance.protocol.image import ImageReport

SECOND = "seed-00000000000000b2"


class Shelf(Book):
    """A book with its ledger of images."""

    @property
    def images(self) -> Images:
        return Images(self.registry, cluster_id="c-1", wall=self.clock.now)

    async def add(self, key: ImageKeyRecord, **changes: Any) -> ImageRecord:
        wish = report(image_key_id=key.image_key_id, **changes)
        return (await self.images.add(wish, actor="op")).record

    async def actions(self) -> list[tuple[str, str, str]]:
        return [(one.action, one.subject, one.detail) for one in await self.registry.audit.read(after=0, limit=1000)]


def run(path: Path, act: Callable[[Shelf, ImageKeyRecord], Coroutine[Any, Any, None]]) -> None:
    async def go() -> None:
        found = Shelf(path / "store.sqlite")
        try:
            await found.registry.load(reserved=())
            await act(found, await found.image_key())
        finally:
            await found.store.close()

    asyncio.run(go())


async def enroll(found: Shelf, key: ImageKeyRecord, image_id: str) -> SeRecord:
    outcome = await found.enroll(key, request(facts=InstanceFacts(image_digest=image_id)))
    assert outcome.record is not None, outcome.verdict
    return outcome.record


async def verdict(found: Shelf, key: ImageKeyRecord, image_id: str) -> Refusals | None:
    outcome = await found.enroll(key, request(facts=InstanceFacts(image_digest=image_id)))
    return outcome.verdict.refusal


# Taking in.


def test_an_image_is_taken_in_once_and_outlives_a_restart(tmp_path: Path) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        wish = report(image_key_id=key.image_key_id)
        first = await found.images.add(wish, actor="op")
        assert (first.is_new, first.changed) == (True, True)
        txns = found.store.txns
        again = await found.images.add(wish, actor="op")
        assert again == (first.record, False, False)
        assert found.store.txns == txns, "the same again is no change"
        fresh = found.another()
        await fresh.load(reserved=())
        assert fresh.images() == [first.record]
        action, subject, detail = (await found.actions())[-1]
        assert (action, subject) == ("image.added", first.record.image_id)
        assert "edge.qcow2 " + "11" * 32 in detail, "the audit has the digests"

    run(tmp_path, act)


def test_several_forms_of_one_build_are_one_image(tmp_path: Path) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        await found.add(key)
        added = await found.images.add(
            report(image_key_id=key.image_key_id, files={"edge.ova": "22" * 32}, also=[SECOND]), actor="op"
        )
        assert (added.is_new, added.changed) == (False, True)
        (only,) = found.registry.images()
        assert only.files == [("edge.qcow2", "11" * 32), ("edge.ova", "22" * 32)]
        for text in (only.image_id, SECOND, "edge", "22" * 32, ("22" * 32).upper()):
            assert found.images.find(text) == only

    run(tmp_path, act)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cluster_id": "c-2"}, "of the cluster 'c-2'"),
        ({"cluster_id": "\x1b" * 100}, "of the cluster"),
        ({"image_key_id": "ik-000000000000"}, "is not known"),
        ({"files": {}}, "doesn't hold"),
    ],
)
def test_what_can_not_be_an_image_of_this_cluster_is_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        with pytest.raises(UsageError, match=told):
            await found.images.add(report(**{"image_key_id": key.image_key_id, **changes}), actor="op")
        assert found.registry.images() == []

    run(tmp_path, act)


def test_what_contradicts_the_ledger_is_refused(tmp_path: Path) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        other = await found.image_key()
        await found.add(key)

        async def refused(told: str, wish: ImageReport) -> None:
            before = found.registry.images()
            with pytest.raises(UsageError, match=told):
                await found.images.add(wish, actor="op")
            assert found.registry.images() == before

        await refused("carries", report(image_key_id=other.image_key_id))
        taken = report(image_key_id=key.image_key_id, image_id=SECOND, also=["seed-0123456789abcdef"])
        await refused("belongs to the image", taken)
        for number in range(1, 5):
            files = {f"{number}-{one}": f"{number * 100 + one:064x}" for one in range(32)}
            wish = report(image_key_id=key.image_key_id, files=files)
            if number < 4:
                await found.images.add(wish, actor="op")
        await refused(f"at most {MAX_FILES}", wish)
        await found.images.revoke("edge", key="keep", actor="op", reason="")
        await refused("was revoked", report(image_key_id=key.image_key_id))

    run(tmp_path, act)


def test_two_at_once_are_both_taken_in(tmp_path: Path) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        await asyncio.gather(
            *(found.add(key, files={f"edge.{number}": f"{number:064x}"}) for number in range(5)),
            found.add(key, image_id=SECOND, name="b"),
        )
        assert [len(image.files) for image in found.registry.images()] == [5, 1]

    run(tmp_path, act)


def test_an_image_that_was_not_stored_is_not_there(tmp_path: Path) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        found.store.fail = ["before"]
        with pytest.raises(StoreError):
            await found.add(key)
        assert found.registry.images() == []
        found.store.fail = ["after"]
        with pytest.raises(StoreError):
            await found.add(key)
        assert not (await found.images.add(report(image_key_id=key.image_key_id), actor="op")).changed

    run(tmp_path, act)


# Finding.


def test_a_name_may_be_ambiguous_and_an_unknown_one_is_told(tmp_path: Path) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        await found.add(key)
        await found.add(key, image_id=SECOND)
        with pytest.raises(UsageError, match="2 images fit"):
            found.images.find("edge")
        with pytest.raises(NotFoundError):
            found.images.find("nothing")
        with pytest.raises(NotFoundError):
            found.images.find("")

    run(tmp_path, act)


def test_who_came_by_which_also_of_those_nobody_added(tmp_path: Path) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        image = await found.add(key, also=[SECOND])
        names = (image.image_id, SECOND, "seed-ffffffffffffffff", "\N{GRINNING FACE}", "")
        ses = [await enroll(found, key, name) for name in names]
        assert found.images.named() == {
            image.image_id: ses[:2],
            "seed-ffffffffffffffff": [ses[2]],
            "\N{GRINNING FACE}": [ses[3]],
        }

    run(tmp_path, act)


def test_the_status_follows_the_key(tmp_path: Path) -> None:
    async def act(found: Shelf, _key: ImageKeyRecord) -> None:
        key = await found.image_key(max_uses=1, expires_in_s=3600)
        image = await found.add(key)
        assert found.images.status(image) == "live"
        await enroll(found, key, image.image_id)
        assert found.images.status(image) == "key used-up"
        found.clock.pass_s(3600)
        assert found.images.status(image) == "key expired"
        await found.registry.revoke_image_key(key.image_key_id, actor="op", reason="")
        assert found.images.status(image) == "key revoked"
        assert found.images.status(msgspec.structs.replace(image, image_key_id="ik-lost")) == "key unknown"
        assert found.images.status((await found.images.revoke("edge", key="ask", actor="op", reason="")).record) == (
            "revoked"
        )

    run(tmp_path, act)


# Revoking.


def test_the_only_image_of_a_key_takes_it_along(tmp_path: Path) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        image = await found.add(key)
        se = await enroll(found, key, image.image_id)
        done = await found.images.revoke("edge", key="ask", actor="op", reason="leaked")
        assert (done.changed, done.key_revoked, done.others) == (True, True, [])
        assert done.record.revoked_at
        assert [(one, subject) for one, subject, _ in await found.actions()][-2:] == [
            ("image-key.revoked", key.image_key_id),
            ("image.revoked", image.image_id),
        ]
        assert await verdict(found, key, image.image_id) is Refusals.IMAGE_REVOKED
        assert await verdict(found, key, "seed-0000000000000bad") is Refusals.IMAGE_KEY_REVOKED, "nor a liar"
        assert found.registry.se(se.se_id) == se, "who is in stays in"
        txns = found.store.txns
        again = await found.images.revoke(image.image_id, key="ask", actor="op", reason="")
        assert (again.changed, again.key_revoked) == (False, False)
        assert found.store.txns == txns

    run(tmp_path, act)


def test_a_key_that_others_carry_needs_a_word(tmp_path: Path) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        image, other = await found.add(key), await found.add(key, image_id=SECOND, name="other")
        with pytest.raises(UsageError, match=f"in other live images too: other .{SECOND}.") as caught:
            await found.images.revoke("edge", key="ask", actor="op", reason="")
        assert "Nothing was changed" in caught.value.hint
        assert await verdict(found, key, image.image_id) is None, "nothing was changed"
        kept = await found.images.revoke("edge", key="keep", actor="op", reason="")
        assert (kept.key_revoked, kept.others) == (False, [other])
        assert await verdict(found, key, image.image_id) is Refusals.IMAGE_REVOKED
        assert await verdict(found, key, SECOND) is None
        # Revoked already: asked again, it changes nothing and asks nothing; with --key the key goes after all.
        assert not (await found.images.revoke("edge", key="ask", actor="op", reason="")).key_revoked
        late = await found.images.revoke("edge", key="revoke", actor="op", reason="")
        assert (late.changed, late.key_revoked) == (False, True)
        assert await verdict(found, key, SECOND) is Refusals.IMAGE_KEY_REVOKED

    run(tmp_path, act)


def test_a_revoked_image_keeps_no_key_alive(tmp_path: Path) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        await found.add(key)
        await found.add(key, image_id=SECOND, name="other")
        await found.images.revoke("edge", key="keep", actor="op", reason="")
        assert (await found.images.revoke("other", key="ask", actor="op", reason="")).key_revoked

    run(tmp_path, act)


def test_an_image_whose_key_was_revoked_before_is_revoked_without_a_question(tmp_path: Path) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        await found.add(key)
        await found.add(key, image_id=SECOND, name="other")
        await found.registry.revoke_image_key(key.image_key_id, actor="op", reason="")
        done = await found.images.revoke("edge", key="ask", actor="op", reason="")
        assert (done.changed, done.key_revoked) == (True, False)

    run(tmp_path, act)


def test_a_cut_between_key_and_image_leaves_the_stronger_of_them(tmp_path: Path) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        image = await found.add(key)
        found.store.fail = ["", "before"]
        with pytest.raises(StoreError):
            await found.images.revoke("edge", key="ask", actor="op", reason="")
        assert await verdict(found, key, image.image_id) is Refusals.IMAGE_KEY_REVOKED
        done = await found.images.revoke("edge", key="ask", actor="op", reason="")
        assert (done.changed, done.record.revoked_at > 0) == (True, True)

    run(tmp_path, act)


def test_revoking_while_many_enroll_leaves_nobody_out_of_the_list(tmp_path: Path) -> None:
    """Whoever got a grant is named by the revocation's answer; whoever came later got none."""

    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        image = await found.add(key)
        asked = [
            asyncio.create_task(found.enroll(key, request(facts=InstanceFacts(image_digest=image.image_id))))
            for _ in range(20)
        ]
        revoking = asyncio.create_task(found.images.revoke("edge", key="ask", actor="op", reason=""))
        later = [
            asyncio.create_task(found.enroll(key, request(facts=InstanceFacts(image_digest=image.image_id))))
            for _ in range(5)
        ]
        await revoking
        named = {se.se_id for se in found.images.named()[image.image_id]}
        outcomes = await asyncio.gather(*asked, *later)
        granted = {one.record.se_id for one in outcomes if one.record is not None}
        assert granted == named
        assert len(granted) == 20
        refused = [one.verdict.decision for one in outcomes if one.record is None]
        assert refused == [Decision.REFUSE] * 5

    run(tmp_path, act)


# Older stores.


def test_an_image_key_of_an_older_store_has_the_settings_rate(tmp_path: Path) -> None:
    async def act(found: Shelf, key: ImageKeyRecord) -> None:
        fields = msgspec.to_builtins(key)
        del fields["rate_per_s"], fields["burst"]
        old = msgspec.json.encode({**fields, "image_key_id": "ik-00000000000a"})
        await found.store.txn([], [Put(records.image_key_key("ik-00000000000a"), old)])
        fresh = found.another()
        await fresh.load(reserved=())
        found_key = fresh.image_key("ik-00000000000a")
        assert found_key is not None
        assert (found_key.rate_per_s, found_key.burst) == (0.0, 0)
        assert fresh.images() == []

    run(tmp_path, act)
