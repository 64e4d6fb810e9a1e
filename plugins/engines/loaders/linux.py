"""Linux kernels: bzImage and what is inside it, boot_params, E820, command line, initrd.

Source: Linux Documentation/arch/x86/boot.rst (protocol 2.15) and zero-page.rst.
"""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.errors import ConfigError, FormatError
from sevlab.core.layout import Layout, raw_bytes, u8, u16, u32, u64
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES

BOOT_FLAG, MAGIC = 0xAA55, int.from_bytes(b"HdrS", "little")
OLDEST = 0x020C
"""2.12 brought XLF_KERNEL_64, without which there is no 64-bit entry."""
XLF_KERNEL_64 = 1 << 0
ENTRY_64 = 0x200
SECTOR = 512
KNOWN_END = 0x290
LOADER_UNDEFINED = 0xFF
LOADED_HIGH, CAN_USE_HEAP = 1 << 0, 1 << 7
E820_RAM, E820_ACPI = 1, 3
LOW_RAM_END, HIGH_RAM = 0x9_8000, 0x10_0000
ACPI_GPA = LOW_RAM_END
"""Tables in a range of their own kind, which an encrypted kernel maps as private."""
PARAMS_GPA, COMMAND_LINE_GPA = 0x9_0000, 0x9_1000


class BootParams(Layout, size=4096):
    """The zero page, with the setup header in it."""

    acpi_rsdp_addr = u64(0x70, doc="GPA", source="zero-page.rst")
    e820_entries = u8(0x1E8, source="zero-page.rst")
    setup_sects = u8(0x1F1, source="boot.rst")
    boot_flag = u16(0x1FE, source="boot.rst")
    header_jump = u16(0x200, doc="second byte: length of the header behind 202h", source="boot.rst")
    header = u32(0x202, source="boot.rst")
    version = u16(0x206, source="boot.rst")
    type_of_loader = u8(0x210, source="boot.rst")
    loadflags = u8(0x211, source="boot.rst")
    ramdisk_image = u32(0x218, source="boot.rst")
    ramdisk_size = u32(0x21C, source="boot.rst")
    cmd_line_ptr = u32(0x228, source="boot.rst")
    initrd_addr_max = u32(0x22C, source="boot.rst")
    kernel_alignment = u32(0x230, source="boot.rst")
    xloadflags = u16(0x236, source="boot.rst")
    cmdline_size = u32(0x238, source="boot.rst")
    payload_offset = u32(0x248, source="boot.rst")
    payload_length = u32(0x24C, source="boot.rst")
    pref_address = u64(0x258, source="boot.rst")
    init_size = u32(0x260, source="boot.rst")
    e820_table = raw_bytes(0x2D0, 20 * 16, source="zero-page.rst")


class BzImage(NamedTuple):
    """A bzImage: its setup header as the start of boot_params, the protected-mode part, the compressed kernel."""

    header: BootParams
    code: bytes
    payload: bytes


def is_bzimage(data: bytes) -> bool:
    """Whether the setup header's magic is there."""
    return len(data) > KNOWN_END and int.from_bytes(data[0x202:0x206], "little") == MAGIC


def parse_bzimage(data: bytes, name: str) -> BzImage:
    """Raises `FormatError` for what has no 64-bit entry or is cut off."""
    if len(data) < KNOWN_END:
        raise FormatError(name, 0, "setup header", expected=f"{KNOWN_END:#x} bytes", found=f"{len(data):#x}")
    end = min(0x202 + data[0x201], KNOWN_END)
    header = BootParams.from_bytes((bytes(0x1F1) + data[0x1F1:end]).ljust(PAGE_BYTES, b"\0"))
    if header.boot_flag != BOOT_FLAG or header.header != MAGIC:
        raise FormatError(name, 0x202, "header magic", expected="HdrS", found=data[0x202:0x206].hex())
    if header.version < OLDEST:
        raise FormatError(name, 0x206, "protocol version", expected="2.12 or newer", found=f"{header.version:#x}")
    if not header.xloadflags & XLF_KERNEL_64:
        raise FormatError(name, 0x236, "xloadflags", expected="a 64-bit kernel", found=f"{header.xloadflags:#x}")
    start = ((header.setup_sects or 4) + 1) * SECTOR
    code = data[start:]
    if len(code) < header.payload_offset + header.payload_length:
        raise FormatError(
            name,
            start,
            "kernel",
            expected=f"{header.payload_offset + header.payload_length:#x} bytes",
            found=f"{len(code):#x}",
        )
    payload = code[header.payload_offset : header.payload_offset + header.payload_length]
    return BzImage(header, code, payload)


def decompress(payload: bytes, name: str) -> bytes:
    """The ELF kernel inside a bzImage, without its decompressor. Raises `ConfigError` for an unknown compression."""
    import bz2
    import gzip
    import lzma
    import zlib

    body = payload[:-4]  # the size of what comes out, for the decompressor
    try:
        if body[:6] == b"\xfd7zXZ\0":
            return lzma.LZMADecompressor().decompress(body)
        if body[:2] == b"\x1f\x8b":
            return gzip.decompress(payload)
        if body[:3] == b"BZh":
            return bz2.decompress(body)
        if body[:4] == b"\x28\xb5\x2f\xfd":
            import zstandard

            return zstandard.ZstdDecompressor().decompressobj().decompress(body)
    except (lzma.LZMAError, OSError, zlib.error, ValueError) as error:
        raise ConfigError(f"{name}: the compressed kernel is damaged: {error}") from error
    raise ConfigError(f"{name}: the kernel is compressed in a way that is not known here ({body[:4].hex()})")


def boot_params(
    header: BootParams, *, memory_bytes: int, initrd: tuple[int, int], command_line: bytes, acpi_bytes: int
) -> bytes:
    """boot_params as a boot loader fills it; `initrd` is (GPA, bytes), `acpi_bytes` lie at `ACPI_GPA`."""
    if len(command_line) > header.cmdline_size:
        raise ConfigError(f"command line of {len(command_line)} bytes: the kernel takes {header.cmdline_size}")
    ranges = [(0, LOW_RAM_END, E820_RAM), (HIGH_RAM, memory_bytes - HIGH_RAM, E820_RAM)]
    ranges.insert(1, (ACPI_GPA, acpi_bytes + -acpi_bytes % PAGE_BYTES, E820_ACPI))
    table = b"".join(
        start.to_bytes(8, "little") + length.to_bytes(8, "little") + kind.to_bytes(4, "little")
        for start, length, kind in ranges
    )
    return header.replace(
        acpi_rsdp_addr=ACPI_GPA,
        e820_entries=len(ranges),
        e820_table=table.ljust(320, b"\0"),
        type_of_loader=LOADER_UNDEFINED,
        loadflags=header.loadflags | LOADED_HIGH | CAN_USE_HEAP,
        cmd_line_ptr=COMMAND_LINE_GPA,
        ramdisk_image=initrd[0] if initrd[1] else 0,
        ramdisk_size=initrd[1],
    ).to_bytes()


def initrd_place(memory_bytes: int, length: int, header: BootParams) -> int:
    """Where an initrd goes: as high as the kernel allows, in whole 2 MiB."""
    top = min(memory_bytes, (header.initrd_addr_max or 0x37FF_FFFF) + 1)
    return (top - length) & -PAGE_2M_BYTES
