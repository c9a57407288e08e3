"""pip-audit on what is shipped: no locked version has a known vulnerability.

It asks a public service. Where that isn't reached there is no answer, and the test says so instead of passing.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from scanners import PROJECT

ALLOWED: dict[str, str] = {}
"""Vulnerability id to the reason why it doesn't touch us."""

UNREACHED = ("ConnectionError", "ConnectTimeout", "ReadTimeout", "NameResolutionError", "ProxyError", "HTTPError")


@pytest.mark.parametrize("lock", ["run", "build"])
def test_no_locked_version_is_known_to_be_vulnerable(lock: str) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "pip_audit", "--disable-pip", "--require-hashes", "--format", "json",
            "--progress-spinner", "off", "--timeout", "5", "--requirement", str(PROJECT / f"requirements/{lock}.txt"),
        ],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    if not done.stdout.strip():
        reasons = [name for name in UNREACHED if name in done.stderr]
        assert reasons, done.stderr
        pytest.skip(f"the vulnerability service can't be reached from here ({reasons[-1]})")
    packages = json.loads(done.stdout)["dependencies"]
    audited = [entry for entry in packages if "skip_reason" not in entry]
    if not audited:
        # A mirror of the package index, without the service's own pages, knows nobody.
        pytest.skip(f"the vulnerability service knows none of {len(packages)} packages: {packages[0]['skip_reason']}")
    assert len(audited) == len(packages), [entry for entry in packages if "skip_reason" in entry]
    found = {
        f"{entry['name']} {entry['version']}": [flaw["id"] for flaw in entry["vulns"] if flaw["id"] not in ALLOWED]
        for entry in audited
    }
    assert not any(found.values()), {name: ids for name, ids in found.items() if ids}
