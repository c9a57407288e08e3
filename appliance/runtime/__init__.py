"""HOW a daemon lives: stop token, clock, back-off, supervisor, children, log, systemd, host."""
