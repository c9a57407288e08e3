"""What the controller remembers: the store port and its SQLite implementation."""
