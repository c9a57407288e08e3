"""What a machine does once, as root, before its daemon lives: first boot. Stage seed."""
