"""Appliance: one executable, run on VM appliances as a controller or as a service engine."""

__version__ = "0.1.0"
