"""Stage seed: what a hypervisor tells a VM as OVF environment. Bytes in, a few texts out; no trust anchor among them.

The document is that of DMTF DSP0243 1.1.1 section 11 (schema DSP8027): `ovf-env.xml` on an ISO, or VMware's
`guestinfo.ovfEnv`. Whoever deploys the VM fills it in, so it may give addresses, a token, a name; never whom to trust.

    <Environment xmlns="…/environment/1" xmlns:oe="…/environment/1">
      <PropertySection> <Property oe:key="appliance.controllers" oe:value="192.0.2.1"/> … </PropertySection>

1. At most `MAX_DOCUMENT_BYTES`, UTF-8, well-formed. A DOCTYPE is refused where it begins, so no entity is ever defined.
2. Only the root's own PropertySections count: those in an `Entity` are other VMs'.
3. Only keys of the class `appliance` are taken, without that prefix: other products' may stand beside them.
4. A key stands once. A value is at most `MAX_VALUE_CHARS` of printable text, blanks round it are cut; empty is as if it
   were not there, since deployment dialogs write what nobody filled in.

Where the document comes from is the matter of whoever reads it (`appliance.machine`).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Final
from xml.parsers import expat

import msgspec

from appliance.errors import SeedError, UsageError
from appliance.protocol import seed, token
from appliance.protocol.address import format_endpoint, parse_endpoint

NAMESPACE: Final = "http://schemas.dmtf.org/ovf/environment/1"
FILE_NAME: Final = "ovf-env.xml"
"""On the ISO of that transport (DSP0243 section 11.2)."""
CLASS: Final = "appliance"
"""`ovf:class` of the ProductSection in our descriptors."""
MAX_DOCUMENT_BYTES: Final = 64 * 1024
MAX_VALUE_CHARS: Final = 4096
MAX_CONTROLLERS: Final = 16
ENROLL_PORT: Final = 8443

_ENVIRONMENT = f"{NAMESPACE} Environment"
_SECTION = f"{NAMESPACE} PropertySection"
_PROPERTY = f"{NAMESPACE} Property"
_HINT = "correct the VM's OVF properties in the hypervisor"


def parse_environment(document: bytes) -> dict[str, str]:
    """Returns the properties of class `appliance`, by their key without that class.

    Args:
        document: the whole file; UTF-8, whatever its XML declaration says.

    Raises:
        SeedError: it isn't an OVF environment, is too large, has a DOCTYPE, or one of our properties breaks rule 4.
            The text of a value, which may be a token, is never repeated.
    """
    if len(document) > MAX_DOCUMENT_BYTES:
        raise SeedError(
            f"the OVF environment has {len(document)} bytes, at most {MAX_DOCUMENT_BYTES} are read", hint=_HINT
        )
    reader = _Reader()
    parser = expat.ParserCreate("utf-8", namespace_separator=" ")
    parser.StartDoctypeDeclHandler = reader.refuse_doctype
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    try:
        parser.Parse(document.rstrip(b"\0"), True)  # VMware's may end in NUL bytes
    except expat.ExpatError as error:
        raise SeedError(f"the OVF environment is no XML: {error}", hint=_HINT) from None
    return reader.found


class _Reader:
    """Takes the properties while expat reads; `path` is where it is."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._seen: set[str] = set()
        self._path: list[str] = []

    def refuse_doctype(self, *_: object) -> None:
        raise SeedError("the OVF environment has a DOCTYPE, which none needs", hint=_HINT)

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if not self._path and name != _ENVIRONMENT:
            raise SeedError(
                f"the root element is {name[:80]!r}, {_ENVIRONMENT!r} expected: that is no OVF environment", hint=_HINT
            )
        self._path.append(name)
        if self._path == [_ENVIRONMENT, _SECTION, _PROPERTY]:
            self._take(attributes)

    def end(self, _name: str) -> None:
        self._path.pop()

    def _take(self, attributes: dict[str, str]) -> None:
        full = attributes.get(f"{NAMESPACE} key", "")
        group, _, key = full.partition(".")
        if group != CLASS or not key:
            return
        if key in self._seen:
            raise SeedError(f"the OVF property {full[:80]!r} stands twice", hint=_HINT)
        self._seen.add(key)
        value = attributes.get(f"{NAMESPACE} value", "").strip()
        if len(value) > MAX_VALUE_CHARS:
            raise SeedError(
                f"the OVF property {full[:80]!r} has {len(value)} characters, at most {MAX_VALUE_CHARS} are read",
                hint=_HINT,
            )
        if not value.isprintable():
            raise SeedError(f"the OVF property {full[:80]!r} has characters that can't be printed", hint=_HINT)
        if value:
            self.found[key] = value


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What the properties say, in types. Empty is: not told."""

    controllers: list[str] = []
    """`host:port` of HTTPS enrollment."""
    token: str = ""
    address: str = ""
    """`address/prefix` of the management interface."""
    gateway: str = ""
    dns: list[str] = []
    operator_key: str = ""
    """Begins like an OpenSSH public key line; whether it is one is for who reads keys."""
    hostname: str = ""


def read_properties(properties: Mapping[str, str]) -> tuple[Told, list[str]]:
    """Gives properties their types.

    Args:
        properties: as `parse_environment` returns them.

    Returns:
        What holds, and what is wrong with the others, one sentence each: a VM shall come up with what is right of it.
        The token's text is in no sentence.
    """
    problems = [
        f"OVF property {key[:80]!r}: there is no such property" for key in sorted(set(properties) - _KNOWN_KEYS)
    ]
    address, gateway = _address(properties, problems)
    hostname = properties.get("hostname", "")
    if wrong := seed.check_hints(seed.Hints(name=hostname)):
        problems += [f"OVF property 'hostname': {one}" for one in wrong]
        hostname = ""
    key = properties.get("operator_key", "")
    if key and not key.startswith("ssh-"):
        problems.append("OVF property 'operator_key': one OpenSSH public key line (ssh-ed25519 …) expected")
        key = ""
    told = Told(
        controllers=_controllers(properties.get("controllers", ""), problems),
        token=_token(properties.get("token", ""), problems),
        address=address,
        gateway=gateway,
        dns=_dns(properties.get("dns", ""), problems),
        operator_key=key,
        hostname=hostname,
    )
    return told, problems


_KNOWN_KEYS = {"controllers", "token", "address", "netmask", "gateway", "dns", "operator_key", "hostname"}


def _words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _controllers(text: str, problems: list[str]) -> list[str]:
    found: list[str] = []
    for word in _words(text):
        try:
            found.append(format_endpoint(*parse_endpoint(word, default_port=ENROLL_PORT)))
        except UsageError as error:
            problems.append(f"OVF property 'controllers': {error.message}")
    if len(found) > MAX_CONTROLLERS:
        problems.append(f"OVF property 'controllers': {len(found)} addresses, the first {MAX_CONTROLLERS} are kept")
    return found[:MAX_CONTROLLERS]


def _token(text: str, problems: list[str]) -> str:
    try:
        if text:
            token.parse(text)
    except UsageError as error:
        problems.append(f"OVF property 'token': {error.message}")
        return ""
    return text


def _dns(text: str, problems: list[str]) -> list[str]:
    found = []
    for word in _words(text):
        try:
            found.append(str(ipaddress.ip_address(word)))
        except ValueError:
            problems.append(f"OVF property 'dns' {word!r}: an address expected")
    return found


def _address(properties: Mapping[str, str], problems: list[str]) -> tuple[str, str]:
    """Returns address/prefix and gateway, each empty where it doesn't hold."""
    address, mask, gateway = (properties.get(key, "") for key in ("address", "netmask", "gateway"))
    if not address:
        problems += [
            f"OVF property {key!r} without an address: DHCP gives it"
            for key, value in (("netmask", mask), ("gateway", gateway))
            if value
        ]
        return "", ""
    whole = f"{address}/{mask}" if mask else address
    interface = _interface(whole) if "/" in whole else None
    if interface is None:
        problems.append(
            f"OVF properties 'address' {address!r} and 'netmask' {mask!r}: 192.0.2.10 with 255.255.255.0 or 24 expected"
        )
        return "", ""
    through = _interface(gateway) if gateway else None
    if gateway and ("/" in gateway or through is None or through.ip not in interface.network):
        problems.append(f"OVF property 'gateway' {gateway!r}: an address in {interface.network} expected")
        gateway = ""
    return interface.with_prefixlen, gateway


def _interface(text: str) -> ipaddress.IPv4Interface | ipaddress.IPv6Interface | None:
    try:
        return ipaddress.ip_interface(text)
    except ValueError:
        return None
