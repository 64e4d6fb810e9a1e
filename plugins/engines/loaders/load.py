"""Which loader a file needs, and what it makes of it."""

from __future__ import annotations

from pathlib import Path

from sevlab.core.errors import ConfigError
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins.engines.loaders import linux
from sevlab.plugins.engines.loaders.elf import MAGIC as ELF_MAGIC
from sevlab.plugins.engines.loaders.elf import Elf, parse_elf
from sevlab.plugins.engines.loaders.image import GuestImage
from sevlab.plugins.engines.loaders.linux import BootParams
from sevlab.plugins.io import acpi_tables

FLAT_GPA = 0x10_0000
ENCRYPTION_MARK = b"Memory Encryption Features active"
"""What the kernel prints at boot; a kernel without CONFIG_AMD_MEM_ENCRYPT does not have the words."""


def read_file(path: Path) -> bytes:
    """Raises `ConfigError` with the name."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def load_guest(
    kernel: Path,
    *,
    memory_bytes: int,
    initrd: Path | None = None,
    append: str = "",
    encrypted: bool = False,
    c_bit_mask: int = 0,
    direct: bool = False,
    cpus: int = 1,
) -> GuestImage:
    """The guest in the file `kernel`: a bzImage, an ELF kernel, or else a flat binary at 1 MiB.

    `direct` takes the kernel out of its bzImage and skips its decompressor. Raises `ConfigError` or `FormatError`.
    """
    data = read_file(kernel)
    if not data:
        raise ConfigError(f"{kernel}: the file is empty")
    name = str(kernel)
    ramdisk = read_file(initrd) if initrd is not None else b""
    if linux.is_bzimage(data):
        bzimage = linux.parse_bzimage(data, name)
        if direct:
            inner = linux.decompress(bzimage.payload, name)
            image = _linux(parse_elf(inner, name), inner, memory_bytes, encrypted)
        else:
            if encrypted:
                _need_encryption(linux.decompress(bzimage.payload, name), name)
            image = _bzimage(bzimage, memory_bytes)
        _parameters(image, bzimage.header, ramdisk, append, memory_bytes, cpus)
    elif data[:4] == ELF_MAGIC:
        elf = parse_elf(data, name)
        if b"Linux version " in data:
            image = _linux(elf, data, memory_bytes, encrypted)
            _parameters(image, plain_header(), ramdisk, append, memory_bytes, cpus)
        else:
            image = _elf(elf, memory_bytes)
    else:
        if data[:2] in (b"MZ", b"#!") or data[:4] == b"\x89PNG":
            raise ConfigError(f"{kernel}: neither a bzImage nor an ELF kernel, and no flat binary either")
        image = GuestImage("flat binary", FLAT_GPA)
        image.add(FLAT_GPA, data, name, memory_bytes)
    if image.kind in ("flat binary", "ELF") and (ramdisk or append):
        raise ConfigError(f"{kernel}: a {image.kind} takes no --initrd and no --append")
    image.finish(c_bit_mask, memory_bytes)
    return image


def kernel_image(kernel: Path) -> bytes:
    """The uncompressed image in a file. Raises `ConfigError` or `FormatError`."""
    data = read_file(kernel)
    return (
        linux.decompress(linux.parse_bzimage(data, str(kernel)).payload, str(kernel))
        if linux.is_bzimage(data)
        else data
    )


def plain_header() -> BootParams:
    """The setup header for a kernel that comes without one."""
    return BootParams.from_bytes(bytes(PAGE_BYTES)).replace(
        boot_flag=linux.BOOT_FLAG,
        header=linux.MAGIC,
        version=0x20F,
        loadflags=linux.LOADED_HIGH,
        cmdline_size=2047,
        initrd_addr_max=0x7FFF_FFFF,
        kernel_alignment=0x20_0000,
        pref_address=0x100_0000,
    )


def _need_encryption(kernel: bytes, name: str) -> None:
    if ENCRYPTION_MARK not in kernel:
        raise ConfigError(f"{name}: built without CONFIG_AMD_MEM_ENCRYPT: it cannot run encrypted")


def _linux(elf: Elf, kernel: bytes, memory_bytes: int, encrypted: bool) -> GuestImage:  # noqa: FBT001
    if encrypted:
        _need_encryption(kernel, "the kernel")
    image = GuestImage("Linux (vmlinux)", elf.entry_physical, rsi=linux.PARAMS_GPA)
    for segment in elf.segments:
        data = segment.data.ljust(segment.memory_bytes, b"\0")
        image.add(segment.physical, data, "the kernel", memory_bytes)
    return image


def _bzimage(bzimage: linux.BzImage, memory_bytes: int) -> GuestImage:
    header = bzimage.header
    where = header.pref_address or 0x100_0000
    image = GuestImage("Linux (bzImage)", where + linux.ENTRY_64, rsi=linux.PARAMS_GPA)
    if where + header.init_size > memory_bytes:
        raise ConfigError(
            f"the kernel needs {where + header.init_size:#x} bytes to unpack itself, and the guest has"
            f" {memory_bytes:#x}: raise --memory"
        )
    image.add(where, bzimage.code, "the kernel", memory_bytes)
    return image


def _parameters(
    image: GuestImage, header: BootParams, ramdisk: bytes, append: str, memory_bytes: int, cpus: int
) -> None:
    """What a boot loader and the firmware leave in memory: initrd, boot_params, command line, ACPI tables."""
    place = linux.initrd_place(memory_bytes, len(ramdisk), header)
    if ramdisk:
        image.add(place, ramdisk, "the initrd", memory_bytes)
    tables = acpi_tables(linux.ACPI_GPA, cpus=cpus)
    line = append.encode() + b"\0"
    page = linux.boot_params(
        header,
        memory_bytes=memory_bytes,
        initrd=(place, len(ramdisk)),
        command_line=line[:-1],
        acpi_bytes=len(tables),
    )
    image.add(linux.PARAMS_GPA, page, "boot_params", memory_bytes)
    image.add(linux.COMMAND_LINE_GPA, line, "the command line", memory_bytes)
    image.add(linux.ACPI_GPA, tables, "ACPI tables", memory_bytes)


def _elf(elf: Elf, memory_bytes: int) -> GuestImage:
    image = GuestImage("ELF", elf.entry_physical)
    for segment in elf.segments:
        image.add(segment.physical, segment.data.ljust(segment.memory_bytes, b"\0"), "the program", memory_bytes)
    return image
