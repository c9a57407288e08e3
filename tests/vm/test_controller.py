"""A controller in a VM: systemd for real, from the first log-in to an SE in a second VM that outlives its reboot.

All tests of a file share one boot each; each brings the machine into the role that it needs, by asking for it.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from guest import Shell, nocloud, operator_key
from images import AGENT, image_builder
from qemu import Vm, need_qemu
from rig import free_ports

from image_builder import controller as recipe

pytestmark = [pytest.mark.slow, pytest.mark.frozen]

SOCKETS = ("appliance-gateway.socket", "appliance-enroll.socket", "appliance-reverse.socket")
DAEMON = "appliance-controller.service"
SE = "appliance-se.service"
PORTS = (22, 8443, 5097)
ADDRESS = "10.77.0.1"
SLOW_S = 1500.0
"""For a boot with all that it starts: two minutes on two idle cores."""


@pytest.fixture(scope="module")
def controller_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A controller's image without any wish."""
    need_qemu()
    directory = tmp_path_factory.mktemp("controller")
    image_builder(
        "build", "--role", "controller", "--name", "controller", "--disk-size", "4G", "--agent-directory", AGENT,
        "--output-directory", directory,
    )  # fmt: skip
    return directory / "controller.qcow2"


@contextlib.contextmanager
def controller_vm(
    directory: Path, image: Path, *, networks: Sequence[str] = (), commands: Sequence[Sequence[str]] = ()
) -> Iterator[tuple[Vm, Shell]]:
    """Boots a controller's VM with an operator's disk; the only way in from here is its admin sshd."""
    key = operator_key(directory)
    disk = nocloud(directory / "operator.iso", key, hostname="node-1", addresses=[f"{ADDRESS}/24"], commands=commands)
    (port,) = free_ports(1)
    forward = f"user,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:2222"
    vm = Vm(
        directory, image, firmware="bios", name="controller", network=forward, networks=networks,
        cdroms=[disk],
    )  # fmt: skip
    with vm, Shell(directory, key, port=port) as shell:
        vm.wait_for("node-1 login:", deadline_s=SLOW_S)
        shell.wait(deadline_s=SLOW_S)
        yield vm, shell


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory, controller_image: Path) -> Iterator[Shell]:
    """A controller's VM that nobody has told anything yet."""
    with controller_vm(tmp_path_factory.mktemp("alone"), controller_image) as (_, shell):
        yield shell


def listeners(shell: Shell) -> dict[int, set[str]]:
    """Returns which programs listen on TCP, by port."""
    found: dict[int, set[str]] = {}
    for line in shell.out("ss -Hltnp").splitlines():
        words = line.split()
        names = set(re.findall(r'\("([^"]+)",pid=', line))
        found.setdefault(int(words[3].rpartition(":")[2]), set()).update(names)
    return found


def states(shell: Shell, *units: str) -> dict[str, tuple[str, str]]:
    """Returns what systemd says of units: enabled, active."""
    found = {}
    for unit in units:
        told = shell.run(f"systemctl is-enabled {unit}; systemctl is-active {unit}", check=False).stdout.split("\n")
        found[unit] = (told[0], told[1])
    return found


def shown(shell: Shell, unit: str, *properties: str) -> dict[str, str]:
    """Returns properties of a unit."""
    text = shell.out(f"systemctl show {unit} --property={','.join(properties)}")
    return dict(line.split("=", 1) for line in text.splitlines())


def digest(shell: Shell, directory: str) -> str:
    """Returns a digest of all files below a directory, their owners and modes."""
    return shell.out(
        f"cd {directory} && find . -printf '%p %u %m\\n' | sort | sha256sum"
        " && find . -type f | sort | xargs -d '\\n' sha256sum | sha256sum"
    )


def told_controller(shell: Shell) -> None:
    """Makes the machine a controller, with a cluster if it has none."""
    shell.run("test -e /var/lib/appliance/controller/cluster.json || "
              f"appliance controller init --address {ADDRESS} --date now")  # fmt: skip
    shell.run("appliance mode set controller")


def test_a_fresh_machine_has_no_role_and_says_what_to_do(shell: Shell) -> None:
    assert shell.json("appliance mode show")["mode"] == "none"
    held = listeners(shell)
    assert held[2222] == {"sshd"}
    assert set(held) == {2222, 53}, "nothing else than sshd, and the resolver on the loopback"
    refused = shell.run("appliance mode set controller", check=False)
    assert refused.returncode == 8
    assert "MODE-008" in refused.stderr
    assert "appliance controller init --address" in refused.stderr
    assert shell.json("appliance mode show")["mode"] == "none"
    assert set(states(shell, DAEMON, *SOCKETS).values()) <= {("disabled", "inactive")}
    assert shell.json("appliance doctor")["ok"]
    assert shell.out("systemctl --failed --no-legend --plain") == ""


def test_the_seed_partition_gave_its_room_to_the_root(shell: Shell) -> None:
    assert shell.out("lsblk --noheadings --output=PARTLABEL /dev/vda").split() == ["APPLIANCE-ESP", "APPLIANCE-ROOT"]
    assert int(shell.out("df --block-size=1M --output=size / | tail -n 1")) > 3500


def test_who_holds_its_port_is_named_and_nothing_changed(shell: Shell) -> None:
    shell.run("appliance mode set none")
    shell.run(f"test -e /var/lib/appliance/controller/cluster.json || "
              f"appliance controller init --address {ADDRESS} --date now")  # fmt: skip
    shell.run("systemd-run --quiet --unit=squatter python3 -m http.server 22")
    try:
        shell.until("ss -Hltn sport = 22", shows=":22")
        pid = shown(shell, "squatter", "MainPID")["MainPID"]
        refused = shell.run("appliance mode set controller", check=False)
        assert refused.returncode == 8
        assert f"is held by python3 (process {pid})" in refused.stderr
        assert "MODE-004" in refused.stderr
        assert shell.json("appliance mode show")["mode"] == "none"
    finally:
        shell.run("systemctl stop squatter")


def test_an_operator_makes_it_a_controller(shell: Shell) -> None:
    told_controller(shell)
    assert set(states(shell, *SOCKETS, DAEMON).values()) == {("enabled", "active")}
    held = listeners(shell)
    for port in PORTS:
        assert held[port] == {"systemd", "appliance"}, held
    unit = shown(shell, DAEMON, "Type", "SubState", "StatusText", "MainPID", "User", "WatchdogUSec")
    assert (unit["Type"], unit["SubState"], unit["WatchdogUSec"]) == ("notify", "running", "1min 30s")
    assert "enroll 8443, ssh 22, reverse 5097" in unit["StatusText"]
    assert shell.out(f"stat --format=%U /proc/{unit['MainPID']}") == "avictlruser"
    assert shell.json("appliance controller show")["addresses"] == [ADDRESS]
    found = shell.json("appliance doctor")
    assert found["ok"], found
    assert {one["check"] for one in found["findings"] if one["result"] != "ok"} <= {"clock"}, "no time server here"


def test_asking_again_changes_nothing(shell: Shell) -> None:
    told_controller(shell)
    before = shown(shell, DAEMON, "MainPID", "NRestarts")
    assert shell.json("appliance mode set controller") == {"mode": "controller", "phase": "done", "not_done": []}
    assert shown(shell, DAEMON, "MainPID", "NRestarts") == before


def test_what_was_stopped_by_hand_is_repaired(shell: Shell) -> None:
    told_controller(shell)
    shell.run("systemctl stop appliance-gateway.socket; systemctl disable --quiet appliance-enroll.socket")
    assert not shell.json("appliance doctor", check=False)["ok"]
    shell.run("appliance mode set controller")
    assert set(states(shell, *SOCKETS, DAEMON).values()) == {("enabled", "active")}
    assert shell.json("appliance doctor")["ok"]


def test_sockets_are_held_while_the_daemon_is_away_and_a_call_starts_it(shell: Shell) -> None:
    told_controller(shell)
    shell.run(f"systemctl stop {DAEMON}")
    held = listeners(shell)
    assert {port: held[port] for port in PORTS} == {port: {"systemd"} for port in PORTS}
    shell.run("timeout 400 bash -c 'exec 3<>/dev/tcp/127.0.0.1/22; head -c 7 <&3' | grep -q SSH-2.0")
    assert states(shell, DAEMON)[DAEMON] == ("enabled", "active")


def test_a_hanging_daemon_is_killed_by_the_watchdog_and_comes_back(shell: Shell) -> None:
    told_controller(shell)
    before = shown(shell, DAEMON, "MainPID", "NRestarts")
    shell.run("cp /run/appliance/health.json /run/appliance/last-words")
    shell.run(f"kill -STOP {before['MainPID']}")
    found = shell.json("appliance doctor", check=False)
    assert "is stopped" in next(one["text"] for one in found["findings"] if one["check"] == "daemon")
    shell.until(
        f"systemctl show {DAEMON} --property=NRestarts,SubState",
        shows=f"NRestarts={int(before['NRestarts']) + 1}\nSubState=running",
        deadline_s=900,
    )
    assert shown(shell, DAEMON, "MainPID")["MainPID"] != before["MainPID"]
    shell.run(
        "test -e /run/appliance/last-words"
    )  # what a killed daemon said of itself stays until the next one speaks
    assert "Watchdog timeout" in shell.out(f"journalctl --unit={DAEMON} --no-pager --lines=60")
    shell.run("appliance controller show")


def test_hardening_holds_and_denies_nothing_that_is_needed(shell: Shell) -> None:
    told_controller(shell)
    told = json.loads(shell.out(f"systemd-analyze security --json=short {DAEMON}"))
    assert told, "nothing was analysed"
    overall = shell.out(f"systemd-analyze security --no-pager {DAEMON}").splitlines()[-1]
    match = re.search(r"Overall exposure level for \S+: ([0-9.]+)", overall)
    assert match, overall
    assert float(match[1]) <= 2.0, overall
    said = shell.out(f"journalctl --unit={DAEMON} --no-pager --output=cat")
    for denial in ("Operation not permitted", "Permission denied", "Read-only file system", "EPERM", "Traceback"):
        assert denial not in said, [line for line in said.splitlines() if denial in line]
    kernel = shell.out("journalctl --dmesg --no-pager").splitlines()
    assert [line for line in kernel if "type=1326" in line] == [], "seccomp refused a call"


@pytest.mark.parametrize(("phase", "wanted"), [("intent", "none"), ("written", "controller")])
def test_a_change_that_was_killed_is_finished_by_asking_again(shell: Shell, phase: str, wanted: str) -> None:
    if wanted == "none":
        told_controller(shell)
    else:
        shell.run("appliance mode set none")
    # The process is killed as soon as the phase is on disk: while systemd stops, or starts, the daemon.
    shell.run(
        f"appliance mode set {wanted} >/dev/null 2>&1 & set=$!; n=0;"
        f" until grep -q {phase} /var/lib/appliance/mode; do sleep 0.1; n=$((n + 1)); [ $n -lt 1500 ] || exit 1; done;"
        " kill -KILL $set"
    )
    found = shell.json("appliance mode show")
    assert (found["target"], found["phase"]) == (wanted, phase)
    shell.run(f"appliance mode set {wanted}")
    found = shell.json("appliance mode show")
    assert (found["mode"], found["phase"]) == (wanted, "done")
    is_on = wanted == "controller"
    assert set(states(shell, *SOCKETS, DAEMON).values()) == {
        ("enabled", "active") if is_on else ("disabled", "inactive")
    }
    assert set(PORTS) & set(listeners(shell)) == (set(PORTS) if is_on else set())


def test_a_controller_with_ses_is_left_by_force_only_and_its_state_stays(shell: Shell) -> None:
    told_controller(shell)
    shell.run("ip address replace 10.77.0.1/24 dev lo")
    shell.run("appliance lab fleet --ses 1 --seconds 1", timeout_s=300)
    refused = shell.run("appliance mode set se", check=False)
    assert refused.returncode == 8
    assert "MODE-003" in refused.stderr
    assert "1 SE is enrolled" in refused.stderr
    assert states(shell, DAEMON)[DAEMON] == ("enabled", "active")
    shell.run("appliance mode set none --force")
    before = digest(shell, "/var/lib/appliance/controller")
    still = shell.run("appliance mode set se", check=False)
    assert shell.json("appliance mode show")["mode"] == "se", still.stderr
    assert set(states(shell, *SOCKETS, DAEMON).values()) == {("disabled", "inactive")}
    assert states(shell, SE)[SE][0] == "enabled"
    assert shown(shell, SE, "User")["User"] == "aviseuser"
    assert digest(shell, "/var/lib/appliance/controller") == before
    shell.run("appliance mode set none")
    assert states(shell, SE)[SE] == ("disabled", "inactive")
    assert digest(shell, "/var/lib/appliance/controller") == before
    shell.run("appliance mode set controller")
    assert [one["name"] for one in shell.json("appliance se list")] == ["sim-1"]


def private_network(directory: Path, own: str, peer: str) -> str:
    """Value of `-netdev` after `id` for one end of a cable between two VMs, which nothing else is on."""
    ends = {"local": directory / own, "remote": directory / peer}
    return "dgram," + ",".join(f"{end}.type=unix,{end}.path={path}" for end, path in ends.items())


def test_an_se_in_another_vm_is_up_and_again_after_the_controllers_reboot(
    tmp_path: Path, controller_image: Path
) -> None:
    """Nobody logs in to make the controller: the disk that is attached has the commands which a recipe would bake."""
    commands = recipe.commands(recipe.Cluster(addresses=[ADDRESS], trust_clock=True))
    cable = private_network(tmp_path, "a", "b")
    with controller_vm(tmp_path, controller_image, networks=[cable], commands=commands) as (_, shell):
        assert set(states(shell, *SOCKETS, DAEMON).values()) == {("enabled", "active")}
        bundle = tmp_path / "bundle.json"
        bundle.write_text(shell.run("cat /var/lib/appliance/controller/bundles/*.json").stdout)
        image_builder(
            "build", "--name", "se", "--bundle", bundle, "--seed-name", "edge-1", "--network-address", "10.77.0.2/24",
            "--agent-directory", AGENT, "--output-directory", tmp_path,
        )  # fmt: skip
        other = private_network(tmp_path, "b", "a")
        with Vm(tmp_path, tmp_path / "se.qcow2", firmware="bios", name="edge", network=other) as edge:
            address = wait_up(shell)
            assert address == "127.1.0.1"
            over_the_reverse_path(shell, address)
            boot = shell.out("cat /proc/sys/kernel/random/boot_id")
            enrolled_at = shell.json("appliance se list")[0]["enrolled_at"]

            shell.run("systemctl reboot", check=False)
            shell.hang_up()
            asked = f"test $(cat /proc/sys/kernel/random/boot_id) != {boot} && echo anew"
            shell.until(asked, shows="anew", deadline_s=SLOW_S)
            wait_up(shell)
            over_the_reverse_path(shell, address)
            assert shell.json("appliance se list")[0]["enrolled_at"] == enrolled_at
            # Nobody could have taken a port before the daemon was there.
            began = int(shown(shell, DAEMON, "ExecMainStartTimestampMonotonic")["ExecMainStartTimestampMonotonic"])
            for unit in SOCKETS:
                held = shown(shell, unit, "ActiveEnterTimestampMonotonic")["ActiveEnterTimestampMonotonic"]
                assert 0 < int(held) < began, (unit, held, began)
            assert "SEED-" not in edge.console()


def wait_up(shell: Shell) -> str:
    """Waits until the one SE is UP, and returns its address. A slow VM may have a reason to be DEGRADED."""
    end = time.monotonic() + SLOW_S
    while True:
        done = shell.run("appliance se list --json", check=False)
        ses = json.loads(done.stdout) if done.returncode == 0 else []
        if [se["state"] in {"UP", "DEGRADED"} for se in ses] == [True]:
            return str(ses[0]["address"])
        assert time.monotonic() < end, f"no SE is UP: {done.stdout}{done.stderr}"
        time.sleep(2)


def over_the_reverse_path(shell: Shell, address: str) -> None:
    """Runs a command on the SE from inside the controller's VM, with the system's ssh and the host key it told."""
    (key,) = shell.json("appliance se show edge-1")["host_keys"]
    shell.run(f"echo '[{address}]:5097 {key}' >/run/known_hosts")
    ssh = "ssh -i /var/lib/appliance/controller/id_se -p 5097 -o UserKnownHostsFile=/run/known_hosts -o BatchMode=yes"
    # A slow VM's sshd may come up after the link.
    shell.until(f"{ssh} aviseuser@{address} 'id -un; hostname' | paste -sd ' '", shows="aviseuser edge-1")
