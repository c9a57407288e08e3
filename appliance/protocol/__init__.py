"""WHAT is said: structs and rules of the stages. Pure: no I/O, no clock, no thread, no key."""
