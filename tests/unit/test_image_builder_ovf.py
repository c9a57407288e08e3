"""The OVF descriptor: of the schema's form, and lint tells each way in which one isn't."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest

from appliance.protocol import ovf
from image_builder import ova, ovf_structure

MACHINE = ova.Machine(name="Räder & Co", version="1", image_id="seed-1", disk_bytes=1 << 31)
DESCRIPTOR = ova.descriptor(MACHINE, disk_name="disk.vmdk", file_bytes=1, populated_bytes=1).decode()


def test_ours_is_of_the_form() -> None:
    assert ovf_structure.check(ET.fromstring(DESCRIPTOR)) == []


def test_first_boot_knows_every_property_that_the_descriptor_offers() -> None:
    _, problems = ovf.read_properties({one.key: "" for one in ova.PROPERTIES})
    assert problems == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("<References>", "<Other/><References>", "References, sections, one VirtualSystem expected"),
        ("<Info>A virtual appliance</Info>", "", "begins with something else than Info and Name"),
        ("<Info>Networks</Info>", "", "the NetworkSection doesn't begin with Info"),
        (' ovf:id="96"', "", "a OperatingSystemSection has no ovf:id"),
        (' ovf:type="string"', "", "a Property has no ovf:type"),
        ("<rasd:InstanceID>2</rasd:InstanceID>", "", "Item '1024 MB of memory' has no InstanceID"),
        (
            "<rasd:Address>0</rasd:Address>\n        <rasd:Description>SCSI controller</rasd:Description>",
            "<rasd:Description>SCSI controller</rasd:Description><rasd:Address>0</rasd:Address>",
            "Item 'SCSI controller 0' aren't CIM's",
        ),
        ("<rasd:Connection>management<", "<rasd:Connection>elsewhere<", "connected to 'elsewhere'"),
        ("<Category>Management</Category>", "<Vendor>x</Vendor>", "aren't in the schema's order"),
        ('ovf:key="token"', 'ovf:key="a.token"', "'a.token' has a '.' or ':'"),
        ('ovf:key="token" ovf:type="string"', 'ovf:key="token" ovf:type="ip"', "'token' has the type 'ip'"),
    ],
)
def test_what_the_schema_refuses_is_told(old: str, new: str, told: str) -> None:
    assert old in DESCRIPTOR
    problems = ovf_structure.check(ET.fromstring(DESCRIPTOR.replace(old, new, 1)))
    assert any(told in one for one in problems), problems
