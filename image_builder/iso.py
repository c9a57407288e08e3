"""Makes a seed's ISO 9660 image with Joliet and Rock Ridge names, label CIDATA: what cloud-init's NoCloud looks for.

Reproducible: the same files and date give the same bytes, in whatever time zone.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import pycdlib
from pycdlib import dates, headervd
from pycdlib import pycdlib as pycdlib_core

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
