"""Makes a seed's ISO 9660 image with Joliet and Rock Ridge names, label CIDATA: what cloud-init's NoCloud looks for.

Reproducible: the same files and date give the same bytes, in whatever time zone.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pycdlib
from pycdlib import dates, headervd
from pycdlib import pycdlib as pycdlib_core

from appliance.errors import ImageError
from appliance.protocol.seed import ISO_LABEL
from image_builder.seed import SeedFile


@contextmanager
def _dated(at: int) -> Iterator[None]:
    """Lets pycdlib, which has no argument for dates, read `at` from its clock, in UTC."""
    clock = SimpleNamespace(
        time=lambda: float(at),
        localtime=time.gmtime,
        gmtime=time.gmtime,
        strftime=time.strftime,
        strptime=time.strptime,
        struct_time=time.struct_time,
    )
    names = [vars(module) for module in (pycdlib_core, headervd, dates)]
    for name in names:
        name["time"] = clock
    try:
        yield
    finally:
        for name in names:
            name["time"] = time


def _iso_name(name: str) -> str:
    """Returns the ISO 9660 level 3 name: capitals, digits, underscores, always one dot (ECMA-119, 7.5)."""
    stem, _, extension = name.partition(".")
    return f"/{stem.upper().replace('-', '_')}.{extension.upper()};1"


def render(files: Sequence[SeedFile], *, at: int) -> bytes:
    """Returns the image's bytes. `at` (seconds since 1970) dates the volume and every file."""
    with _dated(at):
        image = pycdlib.PyCdlib()
        image.new(interchange_level=3, vol_ident=ISO_LABEL, joliet=3, rock_ridge="1.09")
        for file in files:
            image.add_fp(
                io.BytesIO(file.content),
                len(file.content),
                _iso_name(file.name),
                rr_name=file.name,
                joliet_path=f"/{file.name}",
                file_mode=0o100000 | file.mode,
            )
        written = io.BytesIO()
        image.write_fp(written)
        image.close()
    return written.getvalue()


def read(path: Path, *, max_bytes: int) -> dict[str, bytes]:
    """Returns the files in the root folder of an ISO image by their Rock Ridge or Joliet names.

    Raises:
        ImageError: it can't be read, or a file is too large.
    """
    image = pycdlib.PyCdlib()
    found: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    try:
        image.open(str(path))
        kind = "rr_path" if image.has_rock_ridge() else "joliet_path"
        for child in image.list_children(**{kind: "/"}):
            if child is None or not child.is_file():
                continue
            name = image.full_path_from_dirrecord(child, rockridge=kind == "rr_path").lstrip("/")
            sizes[name] = child.get_data_length()
            if sizes[name] <= max_bytes:
                content = io.BytesIO()
                image.get_file_from_iso_fp(content, **{kind: f"/{name}"})
                found[name] = content.getvalue()
        image.close()
    except Exception as error:  # noqa: BLE001 - foreign bytes: pycdlib raises struct and index errors on damage
        raise ImageError(f"{path} can't be read as an ISO image: {error}") from None
    for name, size in sizes.items():
        if name not in found:
            raise ImageError(f"{name} in {path} has {size} bytes, at most {max_bytes} are read")
    return found
