"""Tools that read, replay and compare traces."""
