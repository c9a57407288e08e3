"""sslyze on 8443, judged by Mozilla's `modern` configuration: TLS 1.3 alone, and nothing that is known to be broken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import scanners
from rig import RunningController

ALLOWED = {
    "certificate_path_validation": "the root is the cluster's own; SEs know it from their image, and no other",
    "maximum_certificate_lifespan": "90 days and one day back, for clocks that are late; public CAs' rule for browsers",
    "tls_curves": "X448 and secp521r1 are OpenSSL's defaults and not weak; Python's ssl can name one group or all, and"
    " one would shut out the post-quantum group of newer OpenSSL",
}
"""Findings by id, and why they may stay."""

DEAD = ("ssl_2_0", "ssl_3_0", "tls_1_0", "tls_1_1", "tls_1_2")


def test_mozillas_modern_configuration_holds(controller: RunningController, tmp_path: Path) -> None:
    file = tmp_path / "sslyze.json"
    server = f"127.0.0.1:{controller.enroll_port}"
    done = scanners.run("sslyze", "--mozilla_config", "modern", "--json_out", str(file), server)
    verdict = done.stdout.partition("COMPLIANCE AGAINST")[2]
    assert server in verdict, done.stdout + done.stderr
    found = set(re.findall(r"^\s*\* (\w+): ", verdict, re.MULTILINE))
    assert found <= set(ALLOWED), verdict

    result: dict[str, Any] = json.loads(file.read_text())["server_scan_results"][0]["scan_result"]

    def of(scan: str) -> dict[str, Any]:
        assert result[scan]["status"] == "COMPLETED", f"{scan}: {result[scan]['error_trace']}"
        answer: dict[str, Any] = result[scan]["result"]
        return answer

    for version in DEAD:
        assert not of(f"{version}_cipher_suites")["is_tls_version_supported"], version
    assert of("tls_1_3_cipher_suites")["is_tls_version_supported"]
    assert not of("tls_compression")["supports_compression"]
    assert not of("heartbleed")["is_vulnerable_to_heartbleed"]
    assert not of("openssl_ccs_injection")["is_vulnerable_to_ccs_injection"]
    assert not of("session_renegotiation")["is_vulnerable_to_client_renegotiation_dos"]
    assert of("robot")["robot_result"].startswith("NOT_VULNERABLE")
