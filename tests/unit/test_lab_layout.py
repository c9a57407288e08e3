"""Names, documents and texts of a lab."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from appliance.errors import UsageError
from appliance.lab import layout as lab_layout
from appliance.lab import sshd
from appliance.lab.layout import ControllerPart, Lab, Layout, SePart

ROOT = Path("/srv/lab")


def lab() -> Lab:
    return Lab(
        user="ann",
        controller=ControllerPart(enroll_port=1, ssh_port=2, reverse_port=3, metrics_port=4),
        ses=[SePart(name="se-1", sshd_port=5), SePart(name="se-2", sshd_port=6)],
    )


def test_every_part_is_an_instance_of_its_own() -> None:
    layout = Layout(ROOT)
    assert layout.controller.root == ROOT / "controller"
    assert layout.se("se-1").settings_file == ROOT / "se-1/etc/appliance/settings.toml"
    assert layout.host_key("se-1") == ROOT / "se-1/etc/ssh/ssh_host_ed25519_key"
    assert lab_layout.enroll_url(lab().controller) == "https://127.0.0.1:1/v1/enroll"
    assert lab_layout.metrics_url(lab().controller) == "http://127.0.0.1:4/metrics"


@pytest.mark.parametrize("name", ["a b", "a\nb", 'a"b', "a%b", "a#b", "a\u200bb"])
def test_a_root_that_sshd_would_misread_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="can't be a lab's root"):
        Layout(ROOT / name)


def test_a_root_too_deep_for_sockets_is_refused() -> None:
    with pytest.raises(UsageError, match=r"paths of 1[0-9][0-9] bytes, 107 are possible"):
        Layout(ROOT / ("x" * 70))


def test_the_ssh_command_trusts_the_controllers_records_alone() -> None:
    command = lab_layout.ssh_command(Layout(ROOT), lab(), "127.1.0.1")
    assert command[:2] == ["ssh", "-F"]
    assert command[-1] == "ann@127.1.0.1"
    assert {"StrictHostKeyChecking=yes", f"UserKnownHostsFile={ROOT}/known_hosts"} <= set(command)
    assert command[command.index("-p") + 1] == "3"
    assert lab_layout.known_host("127.1.0.1", 3) == "[127.1.0.1]:3"
    assert lab_layout.known_host("127.1.0.1", 22) == "127.1.0.1"


def test_settings_are_written_as_toml_reads_them() -> None:
    values: dict[str, dict[str, object]] = {
        "a": {"text": "x\\y/z ü\t", "on": True, "list": ["p", "q"], "half": 0.5, "t": {"a": "b"}}
    }
    assert tomllib.loads(lab_layout.to_toml(values)) == values


def configuration(**changes: object) -> dict[str, str]:
    terms: dict[str, object] = {"user": "ann", "openssh": (9, 2), "is_root": False, "shadow": Path("/nonexistent")}
    terms.update(changes)
    text = sshd.configuration(Layout(ROOT), lab().ses[0], **terms)  # type: ignore[arg-type]
    lines = [line.split(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {line[0]: line[1] for line in lines}


def test_sshd_knows_one_key_file_and_nothing_but_public_keys() -> None:
    found = configuration()
    assert found["ListenAddress"] == "127.0.0.1:5"
    assert found["AuthorizedKeysFile"] == f"{ROOT}/se-1/var/lib/appliance/se/authorized_keys"
    assert found["HostKey"] == f"{ROOT}/se-1/etc/ssh/ssh_host_ed25519_key"
    assert found["AuthenticationMethods"] == "publickey"
    assert (found["PasswordAuthentication"], found["KbdInteractiveAuthentication"]) == ("no", "no")
    assert (found["PermitRootLogin"], found["AllowUsers"], found["UsePAM"]) == ("no", "ann", "no")
    assert configuration(is_root=True, user="root")["PermitRootLogin"] == "prohibit-password"


def test_penalties_are_lifted_only_where_sshd_knows_them() -> None:
    assert "PerSourcePenaltyExemptList" not in configuration(openssh=(9, 7))
    assert configuration(openssh=(9, 8))["PerSourcePenaltyExemptList"] == "127.0.0.1"
    assert configuration(openssh=(10, 0))["PerSourcePenaltyExemptList"] == "127.0.0.1"


def test_a_locked_root_is_let_in_through_pam(tmp_path: Path) -> None:
    shadow = tmp_path / "shadow"
    shadow.write_text("bin:*:1::::::\nroot:!:1::::::\nann:*:1::::::\n")
    assert configuration(is_root=True, user="root", shadow=shadow)["UsePAM"] == "yes"
    assert configuration(is_root=True, user="ann", shadow=shadow)["UsePAM"] == "no"
