"""Entry point of `image-builder` (console script, `python -m image_builder`, frozen executable)."""

from __future__ import annotations

import sys

from image_builder.cli import main

if __name__ == "__main__":
    sys.exit(main())
