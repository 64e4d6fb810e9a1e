"""Devices of a minimal guest: each a module with its registers, and a state that resets with the machine."""
