"""`controller init`: what it refuses, what it makes, and that a root on which it was cut short is made anew."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from appliance.controller.audit import Audit
from appliance.controller.init import ControllerInit, initialise
from appliance.controller.material import Files, Material
from appliance.controller.records import ImageKeyRecord
from appliance.controller.registry import Registry
from appliance.controller.store.sqlite import SqliteStore
from appliance.errors import LockedError, SettingsError, StorageError, UsageError
from appliance.paths import Paths
from appliance.pki.identity import Identity
from appliance.protocol.enroll import Policy
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.protocol.seed import Bundle
from appliance.runtime.clock import SystemClock
from appliance.storage.lock import RootLock

RIGHT = SystemClock(synchronised=True)


def init(root: Path, **more: object) -> ControllerInit:
    terms = {"addresses": ["127.0.0.1"], "enroll_port": 8443, "ssh_port": 22, "clock": RIGHT, **more}
    return initialise(Paths(root), **terms)  # type: ignore[arg-type]


def read(root: Path) -> tuple[list[ImageKeyRecord], list[str], bool]:
    """What a daemon would find: image keys, actions in the audit, whether the chain holds."""
    files = Files(Paths(root).controller_state)
    files.check_ready()
    loaded = Material(files)

    async def go() -> tuple[list[ImageKeyRecord], list[str], bool]:
        store = SqliteStore.open(files.store, clock=RIGHT)
        try:
            cluster = loaded.cluster
            audit = Audit(store, cluster_id=cluster.cluster_id, node=cluster.node, epoch=cluster.epoch)
            registry = Registry(store, audit, wall=RIGHT.now)
            await registry.load(reserved=())
            entries = await audit.read()
            return registry.image_keys(), [entry.action for entry in entries], (await audit.verify()).intact
        finally:
            await store.close()

    return asyncio.run(go())


def assert_works(root: Path, made: ControllerInit) -> None:
    keys, actions, intact = read(root)
    assert [key.image_key_id for key in keys] == [made.image_key_id]
    assert actions == ["cluster.created", "image-key.created"]
    assert intact
    bundles = list(Files(Paths(root).controller_state).bundles.iterdir())
    assert bundles == [Path(made.bundle_path)]
    bundle = msgspec.json.decode(bundles[0].read_bytes(), type=Bundle)
    assert bundle.cluster_id == made.cluster_id
    assert Identity.from_pkcs8(bundle.image_key.encode()).public_line == keys[0].public_key
    left = [path for path in Paths(root).state.rglob("*") if path.name.endswith(".tmp")]
    assert left == []


def test_it_makes_a_cluster(tmp_path: Path) -> None:
    made = init(tmp_path, image_key=ImageKeyTermsWish(max_uses=7, note="first"))
    assert_works(tmp_path, made)
    (key,), _, _ = read(tmp_path)
    assert (key.max_uses, key.note, key.policy) == (7, "first", Policy.OPEN)
    assert Path(made.bundle_path).stat().st_mode & 0o777 == 0o600


def test_two_clusters_share_nothing(tmp_path: Path) -> None:
    one, two = init(tmp_path / "1"), init(tmp_path / "2")
    assert len({*one, *two}) == 2 * len(one)


def test_a_clock_that_is_not_synchronised_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="isn't synchronised; it says 20") as caught:
        init(tmp_path, clock=SystemClock(synchronised=False))
    assert "--date" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_vouched_for_date_is_believed_instead(tmp_path: Path) -> None:
    date = 1_900_000_000
    made = init(tmp_path, clock=SystemClock(synchronised=False), date=date)
    assert_works(tmp_path, made)
    loaded = Material(Files(Paths(tmp_path).controller_state))
    assert loaded.authority.not_before == date - 86_400
    assert loaded.trust.signed_at == date
    (key,), _, _ = read(tmp_path)
    assert key.created_at == date


def test_no_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no address"):
        init(tmp_path, addresses=[])


def test_an_address_that_can_not_stand_in_a_certificate_is_refused_and_leaves_the_way_free(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        init(tmp_path, addresses=["no such name"])
    assert_works(tmp_path, init(tmp_path))


def test_an_initialised_root_is_left_alone(tmp_path: Path) -> None:
    made = init(tmp_path)
    with pytest.raises(StorageError, match="holds an initialised controller") as caught:
        init(tmp_path)
    assert "nothing was changed" in caught.value.hint
    assert_works(tmp_path, made)


def test_a_root_that_a_daemon_works_on_is_left_alone(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    paths.state.mkdir(parents=True)
    with RootLock(paths.lock), pytest.raises(LockedError):
        init(tmp_path)


# Power cuts. One child loads the program once and forks for every cut: `cut` ends the process before the n-th call.

CUTTER = """
import json, os, sys
from pathlib import Path
from appliance.controller.init import initialise
from appliance.paths import Paths
from appliance.runtime.clock import SystemClock

def init(root):
    clock = SystemClock(synchronised=True)
    initialise(Paths(root), addresses=["127.0.0.1"], enroll_port=8443, ssh_port=22, clock=clock)

def run_cut(root, name, number):
    pid = os.fork()
    if pid == 0:
        real, calls = getattr(os, name), 0
        def cut(*args, **more):
            nonlocal calls
            calls += 1
            if calls == number:
                os._exit(7)
            return real(*args, **more)
        setattr(os, name, cut)
        try:
            init(root)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

base, made = Path(sys.argv[1]), []
for number in range(1, 1000):
    code = run_cut(base / f"write-{number}", "fsync", number)
    if code == 0:
        break
    assert code == 7, code
    made.append(f"write-{number}")
made.pop()  # before the last fsync the last file is in its place already: this one is whole
full = number - 2
for number in range(1, 1000, 4):
    root = base / f"remove-{number}"
    assert run_cut(root, "fsync", full) == 7
    code = run_cut(root, "unlink", number)
    if code == 0:
        break
    assert code == 7, code
    made.append(f"remove-{number}")
print(json.dumps(made))
"""


def test_cut_at_every_write_and_among_removals_then_repeated(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CUTTER, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stdout)
    assert len([name for name in names if name.startswith("write-")]) > 20
    assert len([name for name in names if name.startswith("remove-")]) > 3
    for name in names:
        root = tmp_path / name
        # Whoever starts a daemon on half a cluster is told to finish it first: `init` would throw its SEs away.
        with pytest.raises(StorageError, match="no initialised controller"):
            Files(Paths(root).controller_state).check_ready()
        assert_works(root, init(root))
