"""Drives one target by coverage: `python tests/fuzz/drive.py TARGET CORPUS [libFuzzer options]`, see `scripts/fuzz`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["appliance", "image_builder"]):
    from targets import TARGETS


def main() -> None:
    """Fills the corpus with good input, and runs until libFuzzer's limit or the first input that breaks the target."""
    logging.disable()  # what readers say of bad input would drown what libFuzzer says
    name, corpus = sys.argv[1], Path(sys.argv[2])
    target = TARGETS[name]
    for number, raw in enumerate(target.good()):
        (corpus / f"good-{number}").write_bytes(raw)

    def hold(raw: bytes) -> None:
        target.run(raw)

    atheris.Setup([sys.argv[0], *sys.argv[2:]], hold)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
