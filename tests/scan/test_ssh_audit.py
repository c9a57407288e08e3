"""ssh-audit on the gateway: no finding above `info`, and its denial-of-service advice answered by our own limits."""

from __future__ import annotations

import json
from typing import Any

import scanners
from rig import RunningController


def findings(report: dict[str, Any]) -> dict[str, list[str]]:
    """Algorithm to what is said against it."""
    found: dict[str, list[str]] = {}
    for kind in ("kex", "key", "enc", "mac"):
        for entry in report[kind]:
            for level in ("warn", "fail"):
                for note in entry.get("notes", {}).get(level, ()):
                    found.setdefault(f"{kind} {entry['algorithm']}", []).append(f"{level}: {note}")
    return found


def test_ssh_audit_finds_nothing(controller: RunningController) -> None:
    done = scanners.run("ssh-audit", "--json", "--port", str(controller.ssh_port), "127.0.0.1")
    report = json.loads(done.stdout)
    assert findings(report) == {}
    assert report["cves"] == []
    assert report["recommendations"] == {}
    assert done.returncode == 0, done.stdout
    # What it looked at is the gateway as it is configured, not half an answer.
    assert next(entry["algorithm"] for entry in report["kex"]) == "mlkem768x25519-sha256"
    assert [entry["algorithm"] for entry in report["key"]] == ["ssh-ed25519"]
    assert "kex-strict-s-v00@openssh.com" in {entry["algorithm"] for entry in report["kex"]}
