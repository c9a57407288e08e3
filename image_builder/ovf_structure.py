"""What the DMTF's schema of OVF 1.x descriptors (DSP8023 1.1) demands, as far as a descriptor like ours can break it.

The schema itself is in no package, so its rules stand here: order of elements, what must be there, what refers to what.
Importers that validate refuse a descriptor for the order of its elements alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree as ET

OVF = "{http://schemas.dmtf.org/ovf/envelope/1}"
RASD = "{http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData}"
VSSD = "{http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData}"

_SECTIONS = {f"{OVF}{name}Section" for name in ("Disk", "Network", "OperatingSystem", "VirtualHardware", "Product")}
_PRODUCT = tuple(f"{OVF}{name}" for name in (
    "Info", "Product", "Vendor", "Version", "FullVersion", "ProductUrl", "VendorUrl", "AppUrl", "Icon",
))  # fmt: skip
_TYPES = {
    *("uint8", "sint8", "uint16", "sint16", "uint32", "sint32", "uint64", "sint64"),
    *("boolean", "string", "real32", "real64"),
}
_ATTRIBUTES = {
    "File": ("id", "href"),
    "Disk": ("diskId", "capacity", "format"),
    "Network": ("name",),
    "VirtualSystem": ("id",),
    "OperatingSystemSection": ("id",),
    "Property": ("key", "type"),
}


def check(envelope: ET.Element) -> list[str]:
    """Returns in which way a descriptor isn't of the schema, one sentence each.

    Args:
        envelope: the root element.
    """
    return [*_outline(envelope), *_attributes(envelope), *_hardware(envelope), *_product(envelope)]


def _short(tag: str) -> str:
    return tag.rpartition("}")[2]


def _outline(envelope: ET.Element) -> Iterator[str]:
    tags = [one.tag for one in envelope]
    wanted = [f"{OVF}References", *(tag for tag in tags if tag in _SECTIONS), f"{OVF}VirtualSystem"]
    if tags != wanted:
        yield f"the Envelope has {', '.join(map(_short, tags))}; References, sections, one VirtualSystem expected"
    system = envelope.find(f"{OVF}VirtualSystem")
    parts = [one.tag for one in system] if system is not None else []
    if system is not None and parts[:2] != [f"{OVF}Info", f"{OVF}Name"]:
        yield "the VirtualSystem begins with something else than Info and Name"
    for section in envelope.iter():
        if section.tag in _SECTIONS and (len(section) == 0 or section[0].tag != f"{OVF}Info"):
            yield f"the {_short(section.tag)} doesn't begin with Info"


def _attributes(envelope: ET.Element) -> Iterator[str]:
    for name, attributes in _ATTRIBUTES.items():
        for one in envelope.iter(f"{OVF}{name}"):
            for attribute in attributes:
                if not one.get(f"{OVF}{attribute}"):
                    yield f"a {name} has no ovf:{attribute}"


def _hardware(envelope: ET.Element) -> Iterator[str]:
    networks = {one.get(f"{OVF}name") for one in envelope.iter(f"{OVF}Network")}
    for space, name in ((VSSD, "System"), (RASD, "Item")):
        for one in envelope.iter(f"{OVF}{name}"):
            tags = [child.tag for child in one]
            label = one.findtext(f"{space}ElementName", "without a name")
            # a sequence in the schema, in which CIM's properties stand by the alphabet
            if tags != sorted(set(tags)) or not all(tag.startswith(space) for tag in tags):
                yield f"the elements of {name} {label!r} aren't CIM's, each once and by the alphabet"
            needed = ("ElementName", "InstanceID", *(("ResourceType",) if name == "Item" else ()))
            lacking = [word for word in needed if not one.findtext(f"{space}{word}")]
            if lacking:
                yield f"{name} {label!r} has no {', '.join(lacking)}"
            network = one.findtext(f"{RASD}Connection")
            if network is not None and network not in networks:
                yield f"{name} {label!r} is connected to {network!r}, which is no network of the descriptor"


def _product(envelope: ET.Element) -> Iterator[str]:
    for section in envelope.iter(f"{OVF}ProductSection"):
        tags = [one.tag for one in section]
        head = [tag for tag in tags if tag in _PRODUCT]
        if head != sorted(head, key=_PRODUCT.index) or tags[: len(head)] != head:
            yield "the elements of the ProductSection aren't in the schema's order, properties last"
        for one in section.iter(f"{OVF}Property"):
            key = one.get(f"{OVF}key", "")
            if "." in key or ":" in key:
                yield f"the property {key!r} has a '.' or ':', which part class and instance from it"
            if one.get(f"{OVF}type", "") not in _TYPES:
                yield f"the property {key!r} has the type {one.get(f'{OVF}type')!r}, which OVF doesn't know"
