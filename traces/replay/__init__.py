"""Replay of imported logs: drive a machine with them and compare what it computes with what was recorded."""
