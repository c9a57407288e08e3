"""What a process loads: the command line must start at once, and an SE in tunnel mode must stay small."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from source_tree import PROJECT

HEAVY = ("asyncssh", "cryptography", "paramiko", "psutil", "pycdlib", "rich", "starlette", "uvicorn", "uvloop")
NOT_IN_A_TUNNEL = ("asyncssh", "click", "joserfc", "pycdlib", "rich", "starlette", "urllib3", "uvicorn", "uvloop")

COMMAND_LINE = """
import sys
from appliance.cli import root
code = root.main({args!r})
assert code == 0, code
"""


def loaded_by(code: str) -> set[str]:
    """Returns the modules that a fresh interpreter has loaded after `code`."""
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport sys\nprint('\\nloaded:', *sys.modules)",
        ],
        cwd=PROJECT,
        env={name: value for name, value in os.environ.items() if not name.startswith(("COV_", "APPLIANCE_"))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.rpartition("loaded:")[2].split())


@pytest.mark.parametrize("args", [["version"], ["--help"], ["completion", "bash"]], ids=" ".join)
def test_the_command_line_loads_no_role(args: list[str]) -> None:
    heavy = loaded_by(COMMAND_LINE.format(args=args)) & set(HEAVY)
    assert not heavy, (
        f"`appliance {' '.join(args)}` loads {', '.join(sorted(heavy))}: it shall answer within 0.2 s; import them in "
        "the function that needs them"
    )


def test_a_tunnel_loads_neither_web_framework_nor_command_line() -> None:
    heavy = loaded_by("import appliance.se.daemon") & set(NOT_IN_A_TUNNEL)
    assert not heavy, (
        f"appliance.se.daemon loads {', '.join(sorted(heavy))}: an SE shall stay under 45 MB; import what only first "
        "boot needs in the function that needs it"
    )


def test_a_link_loads_none_of_what_paramiko_can_do_without() -> None:
    unused = {*NOT_IN_A_TUNNEL, "cryptography.x509", "invoke", "yaml", "zipfile"}
    needless = loaded_by("import appliance.se.links") & unused
    assert not needless, f"appliance.se.links loads {', '.join(sorted(needless))}; see appliance/se/lean_paramiko.py"


def test_protocol_loads_no_dependency_but_msgspec() -> None:
    code = "import appliance.protocol.enroll, appliance.protocol.tunnel, appliance.protocol.fleet"
    assert not loaded_by(code) & {*HEAVY, "click", "appliance.runtime"}
