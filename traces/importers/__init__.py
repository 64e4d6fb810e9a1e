"""Importers: logs of real hypervisors and guests to entries of a trace."""
