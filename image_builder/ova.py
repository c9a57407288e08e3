"""Makes an OVA: descriptor (OVF 1.1, DMTF DSP0243 1.1.1), manifest, optional signature, one streamOptimized VMDK.

What importers insist on: the descriptor is the first member, sizes in it are those of the files, manifest lines read
`SHA256(name)= hex` and don't list the manifest itself, a plain ustar archive. Every byte follows from the arguments.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import tarfile
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import msgspec

from appliance.errors import ImageError, StorageError
from appliance.pki.manifest_signature import sign_manifest
from appliance.pki.secret import Secret
from appliance.protocol.ovf import CLASS

TRANSPORTS = "iso com.vmware.guestInfo"
MAX_TAR_MEMBER = 8 * 1024**3 - 1
"""ustar's limit; larger members need extensions that importers don't know."""
VMDK_OPTIONS = ("-o", "subformat=streamOptimized,adapter_type=lsilogic")
_SECTOR = 512


class Property(msgspec.Struct, frozen=True, kw_only=True):
    """One value that whoever deploys the VM may give."""

    key: str
    label: str
    description: str
    is_secret: bool = False


PROPERTIES = (
    Property(
        key="controllers",
        label="Controller addresses",
        description="host or host:port, separated by blanks; tried besides those of the image.",
    ),
    Property(
        key="token", label="Enrollment token", description="Where the image key's policy asks for one.", is_secret=True
    ),
    Property(key="address", label="Management address", description="IPv4 or IPv6 address; empty takes DHCP."),
    Property(key="netmask", label="Management netmask", description="Mask or prefix length of that address."),
    Property(key="gateway", label="Management gateway", description="Of that address."),
    Property(key="dns", label="DNS servers", description="Addresses, separated by blanks."),
    Property(key="operator_key", label="Operator's SSH key", description="One ssh-ed25519 public key line."),
    Property(key="hostname", label="Host name", description="Of this VM; also the name the SE asks for."),
)
"""Read by the agent at first boot. All of them are hints: none can replace a trust anchor."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What the descriptor says about the VM."""

    name: str
    version: str
    image_id: str
    disk_bytes: int
    """Capacity."""
    cpus: int = 2
    memory_mib: int = 1024


def normalise_vmdk(path: Path) -> None:
    """Gives a streamOptimized VMDK of qemu-img the same bytes in every run: its descriptor holds a random CID.

    Raises:
        ImageError: it isn't such a file.
    """
    with path.open("r+b") as stream:
        head = stream.read(_SECTOR)
        magic, _, _, _, _, at, length = struct.unpack_from("<4sIIQQQQ", head)
        if magic != b"KDMV" or not 0 < length <= 64:
            raise ImageError(f"{path.name} is no streamOptimized VMDK with a descriptor inside")
        stream.seek(at * _SECTOR)
        text = stream.read(length * _SECTOR).rstrip(b"\0")
        fixed, count = re.subn(rb"(?m)^CID=[0-9a-f]+$", b"CID=5eeda991", text)
        if count != 1:
            raise ImageError(f"the descriptor in {path.name} has {count} lines CID=, one expected")
        stream.seek(at * _SECTOR)
        stream.write(fixed.ljust(length * _SECTOR, b"\0"))


def descriptor(machine: Machine, *, disk_name: str, file_bytes: int, populated_bytes: int) -> bytes:
    """Returns the OVF descriptor.

    Args:
        machine: what it describes.
        disk_name: of the VMDK member.
        file_bytes: its size.
        populated_bytes: of content on the disk, roughly.
    """
    properties = "\n".join(
        f'      <Property ovf:key={quoteattr(one.key)} ovf:type="string" ovf:userConfigurable="true"'
        + (' ovf:password="true"' if one.is_secret else "")
        + ' ovf:value="">\n'
        f"        <Label>{escape(one.label)}</Label>\n"
        f"        <Description>{escape(one.description)}</Description>\n"
        "      </Property>"
        for one in PROPERTIES
    )
    name = escape(machine.name)
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"
 xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"
 xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">
  <References>
    <File ovf:id="file1" ovf:href={quoteattr(disk_name)} ovf:size="{file_bytes}"/>
  </References>
  <DiskSection>
    <Info>Virtual disks</Info>
    <Disk ovf:diskId="vmdisk1" ovf:fileRef="file1" ovf:capacity="{machine.disk_bytes}"
     ovf:populatedSize="{populated_bytes}"
     ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  </DiskSection>
  <NetworkSection>
    <Info>Networks</Info>
    <Network ovf:name="management">
      <Description>Leads to the controllers</Description>
    </Network>
  </NetworkSection>
  <VirtualSystem ovf:id="appliance">
    <Info>A virtual appliance</Info>
    <Name>{name}</Name>
    <OperatingSystemSection ovf:id="96">
      <Info>Guest operating system</Info>
      <Description>Debian GNU/Linux 12 (64-bit)</Description>
    </OperatingSystemSection>
    <VirtualHardwareSection ovf:transport="{TRANSPORTS}">
      <Info>Virtual hardware</Info>
      <System>
        <vssd:ElementName>Virtual hardware family</vssd:ElementName>
        <vssd:InstanceID>0</vssd:InstanceID>
        <vssd:VirtualSystemIdentifier>appliance</vssd:VirtualSystemIdentifier>
        <vssd:VirtualSystemType>vmx-13</vssd:VirtualSystemType>
      </System>
      <Item>
        <rasd:AllocationUnits>hertz * 10^6</rasd:AllocationUnits>
        <rasd:Description>Number of virtual processors</rasd:Description>
        <rasd:ElementName>{machine.cpus} virtual processors</rasd:ElementName>
        <rasd:InstanceID>1</rasd:InstanceID>
        <rasd:ResourceType>3</rasd:ResourceType>
        <rasd:VirtualQuantity>{machine.cpus}</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:AllocationUnits>byte * 2^20</rasd:AllocationUnits>
        <rasd:Description>Memory</rasd:Description>
        <rasd:ElementName>{machine.memory_mib} MB of memory</rasd:ElementName>
        <rasd:InstanceID>2</rasd:InstanceID>
        <rasd:ResourceType>4</rasd:ResourceType>
        <rasd:VirtualQuantity>{machine.memory_mib}</rasd:VirtualQuantity>
      </Item>
      <Item>
        <rasd:Address>0</rasd:Address>
        <rasd:Description>SCSI controller</rasd:Description>
        <rasd:ElementName>SCSI controller 0</rasd:ElementName>
        <rasd:InstanceID>3</rasd:InstanceID>
        <rasd:ResourceSubType>VirtualSCSI</rasd:ResourceSubType>
        <rasd:ResourceType>6</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:Address>0</rasd:Address>
        <rasd:Description>IDE controller</rasd:Description>
        <rasd:ElementName>IDE controller 0</rasd:ElementName>
        <rasd:InstanceID>4</rasd:InstanceID>
        <rasd:ResourceType>5</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AddressOnParent>0</rasd:AddressOnParent>
        <rasd:ElementName>Disk 0</rasd:ElementName>
        <rasd:HostResource>ovf:/disk/vmdisk1</rasd:HostResource>
        <rasd:InstanceID>5</rasd:InstanceID>
        <rasd:Parent>3</rasd:Parent>
        <rasd:ResourceType>17</rasd:ResourceType>
      </Item>
      <Item ovf:required="false">
        <rasd:AddressOnParent>0</rasd:AddressOnParent>
        <rasd:AutomaticAllocation>true</rasd:AutomaticAllocation>
        <rasd:ElementName>CD drive 0</rasd:ElementName>
        <rasd:InstanceID>6</rasd:InstanceID>
        <rasd:Parent>4</rasd:Parent>
        <rasd:ResourceType>15</rasd:ResourceType>
      </Item>
      <Item>
        <rasd:AddressOnParent>7</rasd:AddressOnParent>
        <rasd:AutomaticAllocation>true</rasd:AutomaticAllocation>
        <rasd:Connection>management</rasd:Connection>
        <rasd:ElementName>Network adapter 0</rasd:ElementName>
        <rasd:InstanceID>7</rasd:InstanceID>
        <rasd:ResourceSubType>VmxNet3</rasd:ResourceSubType>
        <rasd:ResourceType>10</rasd:ResourceType>
      </Item>
    </VirtualHardwareSection>
    <ProductSection ovf:class="{CLASS}">
      <Info>What this VM is told at its first boot</Info>
      <Product>{name}</Product>
      <Version>{escape(machine.version)}</Version>
      <FullVersion>{escape(machine.version)} {escape(machine.image_id)}</FullVersion>
      <Category>Management</Category>
{properties}
    </ProductSection>
  </VirtualSystem>
</Envelope>
""".encode()


def write(
    target: Path, vmdk: Path, machine: Machine, *, stem: str, epoch: int, populated_bytes: int,
    signer: tuple[bytes, Secret] | None = None,
) -> None:  # fmt: skip
    """Puts the archive together.

    Args:
        target: to be made.
        vmdk: streamOptimized; is normalised.
        machine: for the descriptor.
        stem: name of the members, without ending.
        epoch: date of the members, seconds since 1970.
        populated_bytes: of content on the disk, roughly.
        signer: certificate and key (PEM) that sign the manifest.

    Raises:
        ImageError: the VMDK can't go in.
        TrustError: certificate or key can't sign.
        StorageError: the disk is full.
    """
    normalise_vmdk(vmdk)
    size = vmdk.stat().st_size
    if size > MAX_TAR_MEMBER:
        raise ImageError(f"the VMDK has {size} bytes, an OVA holds at most {MAX_TAR_MEMBER}")
    ovf_name, disk_name, manifest_name = f"{stem}.ovf", f"{stem}-disk1.vmdk", f"{stem}.mf"
    ovf = descriptor(machine, disk_name=disk_name, file_bytes=size, populated_bytes=populated_bytes)
    with vmdk.open("rb") as stream:
        disk_digest = hashlib.file_digest(stream, "sha256").hexdigest()
    lines = ((ovf_name, hashlib.sha256(ovf).hexdigest()), (disk_name, disk_digest))
    manifest = "".join(f"SHA256({name})= {digest}\n" for name, digest in lines).encode()
    members = {ovf_name: ovf, manifest_name: manifest}
    if signer is not None:
        members[f"{stem}.cert"] = sign_manifest(
            manifest, name=manifest_name, certificate_pem=signer[0], key_pem=signer[1]
        )
    try:
        with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name, content in members.items():
                archive.addfile(_member(name, len(content), epoch), io.BytesIO(content))
            with vmdk.open("rb") as stream:
                archive.addfile(_member(disk_name, size, epoch), stream)
    except OSError as error:
        raise StorageError(
            f"the OVA could not be written: {error.strerror}", hint="check the disk's free space"
        ) from error


def _member(name: str, size: int, epoch: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, epoch, 0o644
    return member
