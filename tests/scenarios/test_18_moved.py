"""18: the controller isn't where it was, or not who it was: a blocked port, other addresses, a node that was replaced,
and SEs that come back from an older state or slept through all of it. Each begins with a broken fleet and ends UP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from lab_rig import Cable, RealSe, Site, site
from rig import until

from appliance.errors import TrustError
from appliance.pki.identity import Identity
from appliance.pki.trust import verify_receipt
from appliance.protocol.operator import ImageKeyTermsWish
from appliance.protocol.trust import Envelope
from appliance.protocol.why import Step
from appliance.se.identity import IdentityRecord
from appliance.storage.document import Document

QUICK_REFRESH = {"refresh_after_s": 0.5}
PASSPHRASE = "correct horse battery staple"


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A controller that stays where it is."""
    with site(tmp_path_factory.mktemp("stays")) as found:
        yield found


@pytest.fixture
def moving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A controller of the test's own, to be moved."""
    with site(tmp_path_factory.mktemp("moves")) as found:
        yield found


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends the SEs of a test: the next one's events are its own."""
    yield
    if "at" in request.fixturenames:
        for se in request.getfixturevalue("at").ses:
            se.end()


def veteran(at: Site) -> RealSe:
    """An SE that is UP, and soon asks for its grant again when it isn't."""
    se = at.se(f"se-{len(at.ses) + 1}", settings=QUICK_REFRESH).start()
    at.until_up(se)
    return se


def refreshes(se: RealSe) -> int:
    return se.logged().count("asking for the grant again")


def standing(at: Site, se: RealSe) -> tuple[int, str]:
    detail = at.controller.operator.se(se.name)
    return detail.summary.number, detail.summary.se_id


# Port 22.


@pytest.mark.parametrize(
    "block", [Cable.unplug, pytest.param(Cable.cut, marks=pytest.mark.slow)], ids=["refused", "dropped"]
)
def test_port_22_is_blocked_for_an_hour_after_the_grant(
    at: Site, tmp_path: Path, block: Callable[[Cable], None]
) -> None:
    """An hour is sixty times the time after which an SE asks again; what else an hour brings happens as well: the image
    key ends, the VM is rebooted, the controller is restarted."""
    operator, bundle = at.controller.operator, tmp_path / "bundle.json"
    created = operator.create_image_key(ImageKeyTermsWish(max_uses=1))
    bundle.write_bytes(msgspec.json.encode(created.bundle))
    bundle.chmod(0o600)
    block(at.ssh)
    se = at.se(f"se-{len(at.ses) + 1}", settings=QUICK_REFRESH, bundle=bundle).start()
    until(lambda: refreshes(se) >= 3, what="it has its grant, and asks for it again and again")
    before = standing(at, se)
    operator.revoke_image_key(created.bundle.image_key_id, reason="the hour is over")
    se.kill()
    at.controller.kill()
    at.controller.start()
    se.start()
    asked = refreshes(se)
    until(lambda: refreshes(se) > asked, what="it goes on")
    at.ssh.mend()
    if block is Cable.unplug:
        at.ssh.plug()
    at.until_up(se)
    assert standing(at, se) == before
    assert next(key.uses for key in operator.image_keys() if key.image_key_id == created.bundle.image_key_id) == 1


# Addresses.


@pytest.fixture
def cables() -> Iterator[tuple[Cable, Cable]]:
    """Another way to the controller, for enrolling and for links."""
    made = Cable(), Cable()
    yield made
    for cable in made:
        cable.close()


def move(at: Site, enroll: Cable | None, ssh: Cable) -> None:
    """The controller comes up somewhere else, from its backup; nothing answers where it was, but `enroll` None."""
    controller = at.controller
    box = controller.root.parent / "moving.backup"
    passphrase = controller.root.parent / "passphrase"
    passphrase.write_text(PASSPHRASE)
    controller.command("controller", "backup", "--out", str(box), "--passphrase-file", str(passphrase))
    ports = ["--ssh-port", str(ssh.port)]
    at.ssh.unplug()
    ssh.target = at.ssh.target
    if enroll is not None:
        at.enroll.unplug()
        enroll.target = at.enroll.target
        ports += ["--enroll-port", str(enroll.port)]
    controller.kill()
    shutil.rmtree(controller.paths.controller_state)
    controller.command(
        "controller", "restore", str(box), "--date", "now", "--passphrase-file", str(passphrase),
        "--address", "127.0.0.1", *ports,
    )  # fmt: skip
    controller.start()


@pytest.mark.slow  # the one below that sleeps through more takes this way as well
def test_links_go_elsewhere_and_the_refresh_tells_where(moving: Site, cables: tuple[Cable, Cable]) -> None:
    at = moving
    se = veteran(at)
    before = standing(at, se)
    move(at, None, cables[1])
    at.until_up(se)
    assert cables[1].flows == 1
    assert standing(at, se) == before
    assert at.events("se.clone") == at.events("se.rolled-back") == []


def new_address(cable: Cable, seed: Path, folder: Path) -> None:
    """A seed that says nothing but where the controller is: made anew, or the SE's own with another address."""
    document = json.loads((seed / "seed.json").read_text())
    document["controllers"] = [f"127.0.0.1:{cable.port}"]
    if folder != seed:
        folder.mkdir()
        document |= {"cluster_id": "", "image_key_id": "", "image_id": "", "baked_at": 0}
    (folder / "seed.json").write_text(json.dumps(document))


@pytest.mark.parametrize("way", [pytest.param("seed", marks=pytest.mark.slow), "given"])
def test_all_addresses_change_and_a_seed_tells_the_new_ones(
    moving: Site, cables: tuple[Cable, Cable], tmp_path: Path, way: str
) -> None:
    """The image's own seed was mended, or `appliance enroll --seed PATH` gave one with the address on the console."""
    at = moving
    se = veteran(at)
    before, pid = standing(at, se), se.pid
    move(at, *cables)
    until(lambda: "nonce failed, it will be tried again" in se.logged(), what="it asks where nobody is")
    until(lambda: "Connection refused" in se.failed(Step.LINK), what="it says so")
    seed = at.layout.seed(se.name)
    if way == "seed":
        new_address(cables[0], seed, seed)
        se.stop()
        se.start()
    else:
        new_address(cables[0], seed, tmp_path / "disk")
        given = se.command("enroll", "--wait", "20", "--seed", str(tmp_path / "disk"))
        assert given.returncode == 0, given.stderr
        assert se.pid == pid
    at.until_up(se)
    assert (standing(at, se), at.uses()) == (before, 1)
    # From now on it knows without that seed, also after a restart.
    shutil.rmtree(seed)
    se.stop()
    se.start()
    at.until_up(se)


needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="a hosts file of its own needs root and util-linux"
)


@needs_mounts
def test_a_dns_name_leads_elsewhere(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Only the name is known to the SE, from its seed and from the trust document; its address changes under a link."""
    name, old, new = "controller.test", "127.0.0.71", "127.0.0.72"
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{old} {name}\n")
    own = ["unshare", "--mount", "sh", "-c", f'mount --bind {hosts} /etc/hosts && exec "$@"', "sh"]
    with site(tmp_path_factory.mktemp("dns"), address=old, name=name) as at:
        assert f"{name}:{at.controller.enroll_port}" in json.loads(at.bundle.read_text())["controllers"]
        se = at.se("se-1", settings=QUICK_REFRESH, prefix=own).start()
        at.until_up(se)
        before = standing(at, se)
        at.controller.kill()
        settings = at.controller.paths.settings_file
        settings.write_text(settings.read_text().replace(old, new))
        at.controller.start()
        until(lambda: "Connection refused" in se.failed(Step.LINK), what="nobody is there")
        hosts.write_text(f"{new} {name}\n")
        at.until_up(se)
        assert standing(at, se) == before


# Nodes, roots and keys.


def change(at: Site, kind: str) -> None:
    operator = at.controller.operator
    operator.rotate(kind, "begin")
    operator.rotate(kind, "finish", force=True)


def test_a_node_is_replaced_and_shows_a_new_host_key(at: Site) -> None:
    se = veteran(at)
    before = standing(at, se)
    for cable in (at.ssh, at.enroll):
        cable.unplug()
    until(lambda: se.state == "DOWN", what="the node is gone")
    change(at, "host-key")
    at.controller.kill()
    for name in ("node.key", "node.pem"):
        (at.controller.paths.controller_state / name).unlink()
    at.controller.start()
    # It sees the new key, and must refuse it until its refresh tells it better.
    at.ssh.plug()
    until(lambda: "host key" in se.failed(Step.LINK), what="it refuses a key that nobody told it")
    at.enroll.plug()
    at.until_up(se)
    assert standing(at, se) == before


def test_an_se_sleeps_through_new_roots_nodes_keys_and_addresses(moving: Site, cables: tuple[Cable, Cable]) -> None:
    """Weeks in a store room. The image key it came by is gone, its own key is due for a change, its seed is the old
    one; only its enroll address still leads somewhere."""
    at = moving
    se = veteran(at)
    before, operator = standing(at, se), at.controller.operator
    key = operator.se(se.name).thumbprint
    se.stop()
    for kind in ("host-key", "login-key", "ca"):
        change(at, kind)
    operator.revoke_image_key(operator.image_keys()[0].image_key_id, reason="old")
    operator.rotate_se_key(se.name, reason="due")
    move(at, None, cables[1])
    at.controller.command("controller", "recovery", "end")
    se.start()
    at.until_up(se)
    until(lambda: operator.se(se.name).thumbprint != key, what="its own key changes as well")
    at.until_up(se)
    assert standing(at, se) == before
    assert at.events("se.clone") == at.events("se.rolled-back") == []


def test_ses_sleep_through_several_changes_of_root(moving: Site) -> None:
    """Each was ended by force, and the keys of the former roots are gone. One SE has nothing but its link, one nothing
    but the enroll port, since the host key is another one, too; and an image that was baked before all of it boots."""
    at, operator = moving, moving.controller.operator
    linking, asking = veteran(at), veteran(at)
    linking.write_settings({}, {})  # it has time to link before it would ask for its grant
    before = standing(at, linking), standing(at, asking)
    for se in (linking, asking):
        se.stop()
    old_image = at.se("old-image")
    for _ in range(3):
        change(at, "ca")
    operator.rotate("ca", "forget")
    at.enroll.unplug()
    linking.start()
    at.until_up(linking)
    assert refreshes(linking) == 0
    until(lambda: has_true_receipt(at, linking), what="its receipt is of a root that counts")
    at.enroll.plug()
    change(at, "host-key")
    for se in (asking, old_image):
        se.start()
    for se in (linking, asking, old_image):
        at.until_up(se)
    assert (standing(at, linking), standing(at, asking)) == before
    assert has_true_receipt(at, asking)
    assert at.events("se.clone") == at.events("se.rolled-back") == []


def has_true_receipt(at: Site, se: RealSe) -> bool:
    """Whether the receipt that an SE would show to a restored controller was signed by the root in force alone."""
    root = (at.controller.paths.controller_state / "root-ca.pem").read_text()
    envelope = msgspec.convert(se.stored("identity.json")["grant"]["receipt"], Envelope)
    try:
        verify_receipt(envelope, [root])
    except TrustError:
        return False
    return True


# Older states of SEs.


def snapshot(se: RealSe, to: Path) -> None:
    shutil.copytree(se.paths.se_state, to)


def roll_back(se: RealSe, to: Path) -> None:
    se.kill()
    shutil.rmtree(se.paths.se_state)
    shutil.copytree(to, se.paths.se_state)
    se.start()


def type_in(se: RealSe, token: str, *how: str) -> None:
    """Types a token at the SE's console."""
    line = [sys.executable, "-m", "appliance", "--root", str(se.paths.root), "enroll", "--token", "-", "--wait", "20"]
    given = subprocess.run([*line, *how], input=token, capture_output=True, text=True, timeout=60, check=False)
    assert given.returncode == 0, given.stderr


def test_an_se_is_rolled_back_to_a_snapshot(at: Site, tmp_path: Path) -> None:
    """The trust document it had then is older too, and the image key that it holds again is spent."""
    se = veteran(at)
    before = standing(at, se)
    snapshot(se, tmp_path / "snapshot")
    for _ in range(2):
        se.stop()
        se.start()
        at.until_up(se)
    change(at, "host-key")
    roll_back(se, tmp_path / "snapshot")
    at.until_state(se, "UP ROLLED_BACK")
    assert se.name in at.events("se.rolled-back")[-1], "an operator is told"
    assert at.events("se.clone") == []
    # It is told once; from the next link on it is an SE like any other.
    se.stop()
    se.start()
    at.until_up(se)
    assert standing(at, se) == before


@pytest.mark.slow
def test_an_se_is_rolled_back_to_before_its_key_was_changed(at: Site, tmp_path: Path) -> None:
    """The controller doesn't know the old key any more: a rejoin token makes the machine the same SE again."""
    se = veteran(at)
    before, operator = standing(at, se), at.controller.operator
    snapshot(se, tmp_path / "snapshot")
    key = operator.se(se.name).thumbprint
    operator.rotate_se_key(se.name, reason="test")
    until(lambda: operator.se(se.name).thumbprint != key, what="its key is changed")
    roll_back(se, tmp_path / "snapshot")
    until(lambda: "ENROLL-022" in se.failed(Step.LINK), what="it says that it isn't known any more")
    token = at.controller.command("token", "create", "--rejoin", se.name).stdout
    type_in(se, token, "--anew")
    at.until_up(se)
    assert standing(at, se) == before


def test_a_machine_is_imaged_anew_with_the_same_se_id(at: Site) -> None:
    """Its image carries the se_id that the lost machine had, and makes a new key: refused, until a token says so."""
    se = veteran(at)
    before, uses = standing(at, se), at.uses()
    se.kill()
    document = json.loads((se.paths.se_state / "identity.json").read_text())
    se_id = document["value"]["se_id"]
    shutil.rmtree(se.paths.se_state)
    se.paths.se_state.mkdir(mode=0o700)
    plant(se, se_id)
    se.start()
    until(lambda: "ENROLL-012" in se.failed(Step.GRANT), what="the conflict is told")
    assert "--rejoin" in " ".join(link.hint for link in se.why().steps)
    token = at.controller.command("token", "create", "--rejoin", se.name).stdout
    type_in(se, token)
    at.until_up(se)
    assert (standing(at, se), at.uses()) == (before, uses)
    assert se_id == before[1]


def plant(se: RealSe, se_id: str) -> None:
    """An identity with that id and a key of its own, as an image might bring it."""
    key = Identity.create().pkcs8().reveal().decode()
    record = IdentityRecord(se_id=se_id, key=key, attempt_id="0123456789abcdef")
    Document(se.paths.se_state / "identity.json", IdentityRecord).save(record)
