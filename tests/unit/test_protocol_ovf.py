"""The OVF environment: what is read of it, and that nothing else is."""

from __future__ import annotations

import pytest

from appliance.errors import SeedError
from appliance.protocol import ovf, token

TOKEN = token.compose(b"t" * 32)


def environment(*properties: tuple[str, str], beside: str = "", head: str = '<?xml version="1.0"?>') -> bytes:
    lines = "".join(f'<Property oe:key="{key}" oe:value="{value}"/>' for key, value in properties)
    return (
        f'{head}<Environment xmlns="{ovf.NAMESPACE}" xmlns:oe="{ovf.NAMESPACE}" oe:id="vm-1">'
        f"<PlatformSection><Kind>VMware ESXi</Kind></PlatformSection>"
        f"<PropertySection>{lines}</PropertySection>{beside}</Environment>"
    ).encode()


def test_our_properties_are_taken_and_others_left() -> None:
    beside = (
        '<ve:EthernetAdapterSection xmlns:ve="http://www.vmware.com/schema/ovfenv"><ve:Adapter/>'
        "</ve:EthernetAdapterSection>"
        '<Entity oe:id="vm-2"><PropertySection><Property oe:key="appliance.token" oe:value="other"/></PropertySection>'
        "</Entity>"
    )
    found = ovf.parse_environment(
        environment(
            ("appliance.controllers", " 192.0.2.1 "),
            ("appliance.token", ""),
            ("appliance.hostname", "edge-&#49;"),
            ("other.token", "x"),
            ("appliance", "x"),
            ("appliancex.token", "x"),
            beside=beside,
        )
    )
    assert found == {"controllers": "192.0.2.1", "hostname": "edge-1"}


def test_attributes_without_their_namespace_and_nul_bytes_at_the_end() -> None:
    raw = environment(("appliance.hostname", "a")).replace(b"oe:key", b"key")
    assert ovf.parse_environment(raw) == {}
    assert ovf.parse_environment(environment(("appliance.hostname", "a")) + b"\0\0") == {"hostname": "a"}


def test_properties_elsewhere_are_not_ours() -> None:
    deeper = '<PropertySection><X><Property oe:key="appliance.token" oe:value="t"/></X></PropertySection>'
    direct = '<Property oe:key="appliance.hostname" oe:value="t"/>'
    assert ovf.parse_environment(environment(beside=deeper + direct)) == {}


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "is no XML"),
        (b"\x7fELF", "is no XML"),
        (environment()[:-3], "is no XML"),
        (environment().replace(b"vm-1", b"\xff\xfe"), "is no XML"),
        (environment(("appliance.hostname", "&host;")), "is no XML"),
        (b"<Environment/>", "root element is 'Environment'"),
        (f'<Envelope xmlns="{ovf.NAMESPACE}"/>'.encode(), "root element"),
        (environment(head='<!DOCTYPE Environment [<!ENTITY host "x">]>'), "has a DOCTYPE"),
        (environment(head='<!DOCTYPE Environment SYSTEM "file:///etc/shadow">'), "has a DOCTYPE"),
        (environment(("appliance.token", "a"), ("appliance.token", "")), "'appliance.token' stands twice"),
        (environment(("appliance.hostname", "a&#10;b")), "'appliance.hostname' has characters"),
        (environment(("appliance.hostname", "a" * (ovf.MAX_VALUE_CHARS + 1))), "has 4097 characters, at most 4096"),
        (environment(("x", "a" * ovf.MAX_DOCUMENT_BYTES)), "at most 65536 are read"),
    ],
)
def test_what_is_refused(raw: bytes, said: str) -> None:
    with pytest.raises(SeedError, match=said) as refusal:
        ovf.parse_environment(raw)
    assert refusal.value.hint


def test_an_environment_in_utf_16_is_refused() -> None:
    """One encoding, so that nobody sees another document than we do."""
    with pytest.raises(SeedError, match="is no XML"):
        ovf.parse_environment(environment().decode().encode("utf-16"))


def test_properties_get_their_types() -> None:
    told, problems = ovf.read_properties(
        {
            "controllers": "192.0.2.1, node.example:443 [2001:db8::1]:8443",
            "token": TOKEN,
            "address": "192.0.2.10",
            "netmask": "255.255.255.0",
            "gateway": "192.0.2.254",
            "dns": "192.0.2.53 2001:db8::53",
            "operator_key": "ssh-ed25519 AAAA me",
            "hostname": "edge-1",
        }
    )
    assert problems == []
    assert told == ovf.Told(
        controllers=["192.0.2.1:8443", "node.example:443", "[2001:db8::1]:8443"],
        token=TOKEN,
        address="192.0.2.10/24",
        gateway="192.0.2.254",
        dns=["192.0.2.53", "2001:db8::53"],
        operator_key="ssh-ed25519 AAAA me",
        hostname="edge-1",
    )
    assert ovf.read_properties({}) == (ovf.Told(), [])


@pytest.mark.parametrize(
    ("given", "address", "gateway"),
    [
        ({"address": "192.0.2.10/24"}, "192.0.2.10/24", ""),
        ({"address": "192.0.2.10", "netmask": "24", "gateway": "192.0.2.1"}, "192.0.2.10/24", "192.0.2.1"),
        ({"address": "2001:db8::2", "netmask": "64", "gateway": "2001:db8::1"}, "2001:db8::2/64", "2001:db8::1"),
    ],
)
def test_forms_of_an_address(given: dict[str, str], address: str, gateway: str) -> None:
    told, problems = ovf.read_properties(given)
    assert (told.address, told.gateway, problems) == (address, gateway, [])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"controller": "x"}, "'controller': there is no such property"),
        ({"controllers": "a:b:c"}, "'a:b:c' is no address"),
        ({"controllers": " ".join(f"192.0.2.{n}" for n in range(17))}, "17 addresses, the first 16 are kept"),
        ({"token": "enroll-secret"}, "'token': that is no token"),
        ({"address": "192.0.2.10"}, "255.255.255.0 or 24 expected"),
        ({"address": "192.0.2.10/24", "netmask": "24"}, "255.255.255.0 or 24 expected"),
        ({"address": "edge", "netmask": "24"}, "255.255.255.0 or 24 expected"),
        ({"netmask": "24"}, "'netmask' without an address"),
        ({"gateway": "192.0.2.1"}, "'gateway' without an address"),
        ({"address": "192.0.2.10/24", "gateway": "198.51.100.1"}, "an address in 192.0.2.0/24 expected"),
        ({"address": "192.0.2.10/24", "gateway": "edge"}, "an address in 192.0.2.0/24 expected"),
        ({"dns": "ns.example"}, "'dns' 'ns.example': an address expected"),
        ({"operator_key": "-----BEGIN"}, "'operator_key': one OpenSSH public key line"),
        ({"hostname": "-x"}, "'hostname': name '-x'"),
    ],
)
def test_what_is_wrong_is_left_out_and_told(given: dict[str, str], said: str) -> None:
    told, problems = ovf.read_properties({**given, "token": given.get("token", TOKEN)})
    assert any(said in one for one in problems), problems
    assert "secret" not in "".join(problems)
    assert told.token == ("" if "token" in given else TOKEN)
    assert len(told.controllers) == (16 if len(given.get("controllers", "")) > 100 else 0)
    assert told.address in {"", "192.0.2.10/24"}
    assert told.gateway == told.hostname == told.operator_key == ""
