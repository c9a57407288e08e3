"""What a controller's image carries: cloud-init's part alone, since trust begins on the controller itself.

No key of a cluster is ever baked: where the recipe gives addresses, the VM makes its cluster at first boot, by the same
commands that an operator would type, and its bundle is fetched from there. Pure: no file, no clock.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

from appliance.protocol import seed as protocol
from image_builder import cloud
from image_builder.seed import SeedFile, is_host

CLOCK_WAIT_S = 900
"""How long first boot waits for the time before it gives up; the operator then makes the cluster by hand."""
_WAIT_FOR_CLOCK = (
    "echo 'appliance: waiting for the time to be synchronised';"
    f" timeout {CLOCK_WAIT_S} sh -c"
    """ 'until [ "$(timedatectl show --property=NTPSynchronized --value)" = yes ]; do sleep 2; done'"""
)


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster that the VM makes at first boot."""

    addresses: Sequence[str] = ()
    """By which SEs reach it. Empty: an operator makes the cluster."""
    trust_clock: bool = False
    """Take the hypervisor's time, where no time server is in reach."""


def check(cluster: Cluster) -> list[str]:
    """Returns what is wrong with `cluster`, one sentence each."""
    problems = [
        f"controller.addresses {text!r}: a name or an address without a port expected"
        for text in cluster.addresses
        if not is_host(text)
    ]
    if cluster.trust_clock and not cluster.addresses:
        problems.append("controller.trust_clock: without controller.addresses no cluster is made at first boot")
    return problems


def commands(cluster: Cluster) -> list[list[str]]:
    """Returns what first boot runs, as root. Each may be repeated: a cluster that is there is left alone."""
    if not cluster.addresses:
        return []
    words = [word for address in cluster.addresses for word in ("--address", address)]
    if cluster.trust_clock:
        words += ["--date", "now"]
    wait = [] if cluster.trust_clock else [["sh", "-c", _WAIT_FOR_CLOCK]]
    return [*wait, ["appliance", "controller", "init", *words], ["appliance", "mode", "set", "controller"]]


def files(wishes: cloud.CloudWishes, cluster: Cluster, *, target: cloud.Target, hostname: str) -> list[SeedFile]:
    """Returns the files of the seed partition.

    Args:
        wishes: checked before.
        cluster: checked before.
        target: what kind of disk it is for.
        hostname: empty leaves it alone.
    """
    user = cloud.user_data(wishes, target=target, hostname=hostname, mode="", last=commands(cluster))
    network = cloud.network_config(wishes.network, target=target)
    name = hashlib.sha256(user + (network or b"")).hexdigest()[:16]
    # No name unless it was wished: the image's own would go over that of an operator's disk.
    meta = f"instance-id: controller-{name}\n" + (f"local-hostname: {hostname}\n" if hostname else "")
    found = [SeedFile(protocol.USER_DATA_FILE, user, 0o644), SeedFile(protocol.META_DATA_FILE, meta.encode(), 0o644)]
    if network is not None:
        found.append(SeedFile(protocol.NETWORK_CONFIG_FILE, network, 0o644))
    return found
