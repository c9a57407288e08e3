"""What an operator should look at, one sentence each; empty where all is well. Pure but for what it is given to ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from appliance.controller.fleet import Fleet
from appliance.controller.registry import Registry
from appliance.controller.renewal import Expiry
from appliance.protocol.enroll import SeStatus


def find(
    registry: Registry,
    fleet: Fleet,
    *,
    expiries: Iterable[Expiry],
    backup_is_due: bool,
    short_of_bytes: int,
    clock_is_synchronised: bool,
    now: float,
) -> Iterator[str]:
    """Yields the problems.

    Args:
        registry: whose image keys and waiting SEs count.
        fleet: whose copies in quarantine count.
        expiries: what expires when.
        backup_is_due: whether the root changed, and no backup was taken since that began.
        short_of_bytes: the disk reserve where it is touched, else 0.
        clock_is_synchronised: as the kernel says.
        now: seconds since 1970.
    """
    if short_of_bytes:
        yield f"less than {short_of_bytes >> 20} MiB of disk are free: enrollments are refused"
    if not clock_is_synchronised:
        yield "the clock isn't synchronised"
    for expiry in expiries:
        if expiry.reached(now):
            yield expiry.sentence(now)
    if backup_is_due:
        yield (
            "no backup was taken since the change of the root CA began, and an older one brings no SE back after it: "
            "`appliance controller backup --out FILE`"
        )
    if not any(key.is_active(now) for key in registry.image_keys()):
        yield "no image key is active: no new SE can enroll; see `appliance image-key create`"
    waiting = sum(1 for record in registry.ses() if record.status is SeStatus.PENDING)
    if waiting:
        noun = "SE waits" if waiting == 1 else "SEs wait"
        yield f"{waiting} {noun} for approval; see `appliance se pending`"
    for record, _ in fleet:
        if held := fleet.quarantined(record.se_id):
            yield f"{record.name}: a copy from {held[0].source} is in quarantine"
