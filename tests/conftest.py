"""Settings of all tests."""

from __future__ import annotations

import signal

from hypothesis import settings

# A deadline measures the machine, not the code: on two busy cores any example may take long.
settings.register_profile("appliance", deadline=None)
settings.load_profile("appliance")

# A shell that runs the tests in the background has Ctrl-C ignored, by them and by all that they start: what a Ctrl-C
# does to our programs couldn't be seen then.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
