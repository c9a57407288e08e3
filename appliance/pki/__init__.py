"""WHO is trusted: the only home of `cryptography`."""
