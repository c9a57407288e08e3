"""controller.renewal: which warnings are due, and when; of what."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.controller import material
from appliance.controller.material import Files, Material
from appliance.controller.renewal import DAY_S, WARN_DAYS, Expiry, Warnings, of_material
from appliance.pki import sealed
from appliance.pki.secret import Secret

NOW = 1_800_000_000
END = 1000 * DAY_S
ADVICE = "do this"


def root(life_days: float = 1000) -> Expiry:
    return Expiry("root CA", END, END - life_days * DAY_S, ADVICE)


def told(warnings: Warnings, days_left: float, expiry: Expiry | None = None) -> list[str]:
    return warnings.due([expiry or root()], END - days_left * DAY_S)


def test_each_threshold_is_told_once_with_what_to_do() -> None:
    warnings = Warnings()
    assert told(warnings, 31) == []
    for days in WARN_DAYS:
        assert told(warnings, days) == [f"the root CA expires in {days} days: do this"]
        assert told(warnings, days - 0.1) == []
    assert told(warnings, -1) == ["the root CA has expired: do this"]
    assert told(warnings, -2) == []


def test_who_comes_late_hears_the_nearest_warning_only() -> None:
    assert told(Warnings(), 1.4) == ["the root CA expires in 1 day: do this"]
    assert told(Warnings(), -3) == ["the root CA has expired: do this"]


def test_what_was_renewed_is_warned_of_again() -> None:
    warnings = Warnings()
    assert told(warnings, 6)
    assert told(warnings, 90) == []
    assert told(warnings, 6) == ["the root CA expires in 6 days: do this"]


@pytest.mark.parametrize(
    ("life_days", "thresholds"), [(1000, [30, 7, 2]), (60, [30, 7, 2]), (30, [7, 2]), (7, [2]), (3, [])]
)
def test_what_lives_shortly_is_not_warned_of_from_its_first_day_on(life_days: float, thresholds: list[int]) -> None:
    assert root(life_days).days() == thresholds
    assert root(life_days).reached(END - life_days * DAY_S) == []


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr(sealed, "SCRYPT_LOG2_N", 4)
    files = Files(tmp_path / "state")
    material.create(
        files, cluster_id="c-1", addresses=["127.0.0.1"], enroll_port=8443, ssh_port=22, now=NOW,
        passphrase=Secret(b"correct horse battery"),
    )  # fmt: skip
    return files


def test_every_certificate_of_a_controller_is_warned_of_at_30_7_and_2_days(files: Files) -> None:
    loaded = Material(files)
    found = {expiry.what: expiry for expiry in of_material(loaded)}
    assert set(found) == {"root CA", "issuing CA", "node certificate"}
    for expiry in found.values():
        assert expiry.days() == list(WARN_DAYS)
        assert expiry.reached(NOW) == []
        assert expiry.reached(expiry.expires_at - 2 * DAY_S) == list(WARN_DAYS)
    assert "issuing-ca renew" in found["issuing CA"].advice
    assert "rotate-ca begin" in found["root CA"].advice
    assert "renews itself" in found["node certificate"].advice
    assert found["issuing CA"].expires_at == NOW + 365 * DAY_S


def test_a_node_certificate_at_the_issuing_cas_end_is_not_renewed_again_and_again(files: Files) -> None:
    loaded = Material(files)
    assert loaded.issuing is not None
    late = loaded.issuing.expires_at - 10 * DAY_S
    assert loaded.renewal_due(late)
    loaded.renew_node_certificate(late)
    assert loaded.node_certificate_expires_at == loaded.issuing.expires_at
    assert not loaded.renewal_due(loaded.issuing.expires_at - 1)
    node = {expiry.what: expiry for expiry in of_material(loaded)}["node certificate"]
    assert node.advice == "it ends with the issuing CA"


def test_a_node_certificate_that_cannot_be_read_is_told(files: Files) -> None:
    files.node_certificate.write_text("nonsense")
    node = {expiry.what: expiry for expiry in of_material(Material(files))}["node certificate"]
    assert node.reached(NOW)
    assert node.sentence(NOW).startswith("the node certificate has expired")
