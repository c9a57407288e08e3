"""What OpenSSH makes of the texts that pki.ssh_keys writes, and pki.ssh_keys of what OpenSSH writes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from appliance.errors import TrustError
from appliance.pki import ssh_keys
from appliance.pki.identity import Identity, verify

SSH_KEYGEN = shutil.which("ssh-keygen") or ""
pytestmark = pytest.mark.skipif(not SSH_KEYGEN, reason="needs ssh-keygen: apt-get install openssh-client")


def keygen(*args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [SSH_KEYGEN, *map(str, args)], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def stored(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def generated(path: Path, *args: str) -> Path:
    keygen("-q", "-N", "", "-C", "", "-f", path, *args)
    return path


def line_of(path: Path) -> str:
    return " ".join(path.with_suffix(".pub").read_text().split()[:2])


def fingerprints(path: Path) -> list[str]:
    return [line.split()[1] for line in keygen("-l", "-f", path).stdout.splitlines()]


def test_fingerprints_agree(tmp_path: Path) -> None:
    for number in range(5):
        _, line = ssh_keys.generate()
        shown = keygen("-l", "-f", stored(tmp_path / f"{number}.pub", f"{line}\n".encode())).stdout.split()
        assert shown[0] == "256"
        assert shown[1] == ssh_keys.fingerprint(line)
        assert shown[-1] == "(ED25519)"


def test_openssh_reads_our_private_keys(tmp_path: Path) -> None:
    private, line = ssh_keys.generate()
    path = stored(tmp_path / "id", private.reveal())
    assert keygen("-y", "-f", path).stdout.split()[:2] == line.split()
    assert fingerprints(path) == [ssh_keys.fingerprint(line)]


def test_an_identity_that_went_through_pkcs8_is_the_same_to_openssh(tmp_path: Path) -> None:
    identity = Identity.create()
    again = Identity.from_pkcs8(identity.pkcs8().reveal())
    path = stored(tmp_path / "id", again.openssh().reveal())
    assert keygen("-y", "-f", path).stdout.split()[:2] == identity.public_line.split()


def test_we_read_openssh_private_keys(tmp_path: Path) -> None:
    path = generated(tmp_path / "id", "-t", "ed25519")
    identity = Identity.from_pkcs8(path.read_bytes())
    assert identity.public_line == line_of(path)
    assert fingerprints(path) == [identity.thumbprint]
    assert verify(line_of(path), identity.sign(b"m"), b"m")
    assert serialization.load_pem_private_key(identity.pkcs8().reveal(), None)


@pytest.mark.parametrize(
    ("kind", "says"), [(("rsa", "-b", "2048"), "'ssh-rsa'"), (("ecdsa", "-b", "256"), "'ecdsa-sha2-nistp256'")]
)
@pytest.mark.parametrize("form", ["RFC4716", "PKCS8", "PEM"])
def test_other_kinds_of_keys_are_refused(tmp_path: Path, kind: tuple[str, ...], says: str, form: str) -> None:
    path = generated(tmp_path / "id", "-m", form, "-t", *kind)
    with pytest.raises(TrustError, match=f"{says}, 'ssh-ed25519' expected"):
        ssh_keys.parse_public(line_of(path))
    with pytest.raises(TrustError, match="another kind, Ed25519 expected"):
        ssh_keys.load_private(path.read_bytes())


def test_an_encrypted_private_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "id"
    keygen("-q", "-t", "ed25519", "-N", "passphrase", "-f", path)
    with pytest.raises(TrustError, match="encrypted"):
        ssh_keys.load_private(path.read_bytes())


def test_a_line_with_openssh_s_comment_is_refused_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "id"
    keygen("-q", "-t", "ed25519", "-N", "", "-C", "me@here", "-f", path)
    text = path.with_suffix(".pub").read_text()
    with pytest.raises(TrustError):
        ssh_keys.parse_public(text)
    assert ssh_keys.parse_public(line_of(path))


def test_openssh_finds_our_hosts(tmp_path: Path) -> None:
    (_, one), (_, two) = ssh_keys.generate(), ssh_keys.generate()
    lines = [
        ssh_keys.known_hosts_line(["[127.1.0.1]:5097", "se-1"], one),
        ssh_keys.known_hosts_line(["127.1.0.2", "[::1]:2222"], two),
    ]
    path = stored(tmp_path / "known_hosts", "".join(f"{line}\n" for line in lines).encode())
    assert fingerprints(path) == [ssh_keys.fingerprint(one), ssh_keys.fingerprint(two)]
    for host, line in (("[127.1.0.1]:5097", one), ("se-1", one), ("127.1.0.2", two), ("[::1]:2222", two)):
        assert keygen("-F", host, "-f", path).stdout.splitlines()[-1].endswith(line)
    for host in ("127.1.0.1", "[127.1.0.2]:5097", "se-2"):
        assert keygen("-F", host, "-f", path, check=False).returncode == 1


def test_openssh_reads_our_authorized_keys(tmp_path: Path) -> None:
    lines = []
    for number in (1, 258):
        _, line = ssh_keys.generate()
        lines.append(line)
        restricted = ssh_keys.authorized_keys_line(
            line, number=number, reverse_port=5097, permit_open=["channel:80", "[::1]:443"], comment=f"se {number}"
        )
        with (tmp_path / "authorized_keys").open("a") as file:
            file.write(restricted + "\n")
    path = tmp_path / "authorized_keys"
    assert fingerprints(path) == [ssh_keys.fingerprint(line) for line in lines]
    assert [line.split()[2:4] for line in keygen("-l", "-f", path).stdout.splitlines()] == [["se", "1"], ["se", "258"]]


def test_openssh_agrees_that_a_damaged_private_key_is_none(tmp_path: Path) -> None:
    private, _ = ssh_keys.generate()
    content = private.reveal()
    damaged = content[:120] + (b"A" if content[120:121] != b"A" else b"B") + content[121:]
    with pytest.raises(TrustError):
        ssh_keys.load_private(damaged)
    assert keygen("-y", "-f", stored(tmp_path / "id", damaged), check=False).returncode != 0
