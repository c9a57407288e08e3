"""Measures what the project promises about itself, beside a peer in the same run; started by `scripts/bench`.

One module a bench, named like it, with `run(stand, options) -> Report`. What they stand on:

    report      rows, the JSON, the table
    stand       which executables are measured, a place for their state, a controller of its own
    processes   memory and time of processes, bytes of a TCP connection: read from the kernel, not from the measured
    openssh     the peer: sshd with ssh or autossh

Everything runs on loopback, has a deadline, and is ended by the bench that started it.
"""
