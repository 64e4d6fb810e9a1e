"""From a file to a guest: flat binaries, ELF kernels, bzImage."""
