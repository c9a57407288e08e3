"""Entry of the program: `appliance`, `python -m appliance`, and the frozen executable."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    if getattr(sys, "frozen", False):
        # A frozen child that multiprocessing starts is this program again: it must be caught before the command line.
        import multiprocessing

        multiprocessing.freeze_support()
    from appliance.cli import root

    sys.exit(root.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
