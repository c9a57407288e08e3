"""19: private keys, tokens and link tickets stand in their own files, and nowhere that anybody else looks.

A controller and an SE that came by a token live through what makes programs talk: log-ins, a restart, refusals, damaged
files. Then every secret is searched for in logs, answers, errors, process lists, environments, metrics and the audit.
"""

from __future__ import annotations

import base64
import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from lab_rig import RealSe, Site, site
from rig import core_limit, until

from appliance.protocol.enroll import Policy
from appliance.protocol.operator import ImageKeyTermsWish, TokenWish
from appliance.protocol.why import Step

SHOWN = (
    ("status",), ("se", "list"), ("se", "show", "se-1"), ("why", "se-1"), ("events",), ("audit", "show"),
    ("controller", "show"), ("image-key", "list"), ("token", "list"), ("doctor",),
)  # fmt: skip
"""What operators see, all of it as JSON."""


def body(pem: str) -> str:
    """The longest line of a PEM file: what no two keys share."""
    return max(pem.splitlines(), key=len)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, RealSe, str]]:
    """The two, after all of it, and the token."""
    with site(tmp_path_factory.mktemp("secret")) as at:
        bundle = tmp_path_factory.mktemp("bundle") / "bundle.json"
        created = at.controller.operator.create_image_key(ImageKeyTermsWish(policy=Policy.TOKEN))
        bundle.write_bytes(msgspec.json.encode(created.bundle))
        bundle.chmod(0o600)
        token = at.controller.operator.create_token(TokenWish(image_key_id=created.bundle.image_key_id)).token
        se = at.se("se-1", bundle=bundle)
        seed = at.layout.seed("se-1") / "seed.json"
        # At first without it, so that it is asked for.
        good = json.loads(seed.read_text())
        se.start()
        until(lambda: se.failed(Step.GRANT), what="its token is missed")
        se.kill()
        seed.write_text(json.dumps({**good, "token": token}))
        se.start()
        at.until_up(se)
        at.ssh.reset()
        at.until_up(se)
        yield at, se, token


def secrets(at: Site, se: RealSe, token: str) -> dict[str, bytes]:
    """Name to what must not be found."""
    state, found = at.controller.paths.controller_state, {}
    for name in ("root-ca.key", "node.key", "ssh_host_ed25519_key", "id_se"):
        found[name] = body((state / name).read_text()).encode()
    nonce = (state / "nonce.key").read_bytes()
    found |= {"nonce key": nonce, "nonce key, hex": nonce.hex().encode(), "nonce key, base64": base64.b64encode(nonce)}
    found["image key"] = body(json.loads(at.bundle.read_text())["image_key"]).encode()
    found["SE's key"] = body(se.stored("identity.json")["key"]).encode()
    found["SE's image key"] = body((at.layout.seed("se-1") / "image-key.pem").read_text()).encode()
    found["token"] = token.partition("-")[2].encode()
    for node, ticket in se.stored("tickets.json")["tickets"].items():
        found[f"ticket of node {node}"] = json.dumps(ticket).strip('"').encode()
    return found


def refuse(place: str, content: bytes, hidden: dict[str, bytes]) -> None:
    held = [name for name, secret in hidden.items() if secret in content]
    assert not held, f"{place} holds {held}"


def test_no_log_and_no_answer_tells_a_secret(told: tuple[Site, RealSe, str]) -> None:
    at, se, _ = told
    hidden = secrets(*told)
    assert len(hidden) >= 10
    assert all(len(secret) >= 16 for secret in hidden.values()), "too short to be found by chance"
    for path in (at.controller.log, se.log, *at.layout.sshd("se-1").glob("*.log")):
        assert path.stat().st_size
        refuse(str(path), path.read_bytes(), hidden)
    for paths in (at.controller.paths, se.paths):
        for path in paths.run.rglob("*"):
            if path.is_file():
                refuse(str(path), path.read_bytes(), hidden)
    for words in SHOWN:
        done = at.controller.command(*words, "--json", check=False)
        assert done.stdout, words
        refuse(" ".join(words), (done.stdout + done.stderr).encode(), hidden)
    for words in (("why",), ("status",), ("doctor",)):
        done = se.command(*words, "--json")
        refuse(f"on the SE: {words[0]}", (done.stdout + done.stderr).encode(), hidden)
    with urllib.request.urlopen(f"http://127.0.0.1:{at.controller.bound['metrics_port']}/metrics", timeout=10) as page:
        refuse("metrics", page.read(), hidden)
    kept = {name: secret for name, secret in hidden.items() if not name.startswith("ticket")}
    refuse("the store", at.controller.paths.store_file.read_bytes(), kept)


def test_no_process_list_and_no_environment_tells_a_secret(told: tuple[Site, RealSe, str]) -> None:
    at, se, _ = told
    hidden = secrets(*told)
    assert at.controller.process is not None
    seen = 0
    for pid in (at.controller.process.pid, se.pid):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            for name in ("cmdline", "environ"):
                refuse(f"{name} of {process.name()}", Path(f"/proc/{process.pid}/{name}").read_bytes(), hidden)
                seen += 1
    assert seen >= 4
    # A core file would hold it all: neither writes one.
    for pid in (at.controller.process.pid, se.pid):
        assert core_limit(pid) == (0, 0)


@pytest.mark.parametrize("name", ["root-ca.key", "id_se", "ssh_host_ed25519_key"])
def test_an_error_about_a_damaged_key_does_not_quote_it(
    told: tuple[Site, RealSe, str], tmp_path: Path, name: str
) -> None:
    """A copy of the controller with a key that lost its end, as the daemon finds it when it starts."""
    at, _, _ = told
    root = tmp_path / "copy"
    shutil.copytree(at.controller.paths.state, root / "var/lib/appliance")
    path = root / "var/lib/appliance/controller" / name
    path.write_text(path.read_text().rpartition("-----END")[0][:-3])
    done = at.controller.command("--root", str(root), "run", check=False)
    assert done.returncode == 4, done.stderr
    assert str(path) in done.stderr
    refuse("the error", (done.stdout + done.stderr).encode(), secrets(*told))
