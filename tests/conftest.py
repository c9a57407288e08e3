"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# A deadline measures the machine, not the code: on two busy cores any example may take long.
settings.register_profile("appliance", deadline=None)
settings.load_profile("appliance")
