"""The behaviour of every legacy command: one function each, in the firmware's order of checks."""
