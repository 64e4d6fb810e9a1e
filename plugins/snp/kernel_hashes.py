"""The table of kernel hashes that QEMU puts into the guest's memory, for the firmware to compare with.

Source: QEMU target/i386/sev.c (sev_add_kernel_loader_hashes); edk2 OvmfPkg/AmdSev/BlobVerifierLibSevHashes.
"""

from __future__ import annotations

import hashlib
import uuid

from sevlab.core.layout import Layout, raw_bytes, u16
from sevlab.core.units import PAGE_BYTES

QEMU = "QEMU target/i386/sev.c"


def _guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


TABLE_GUID = _guid("9438d606-4f22-4cc9-b479-a793d411fd21")
COMMAND_LINE_GUID = _guid("97d02dd8-bd20-4c94-aa78-e7714d36ab2a")
INITRD_GUID = _guid("44baf731-3a2f-4bd7-9af1-41e29169781d")
KERNEL_GUID = _guid("4de79437-abd2-427f-b835-d5b172d2045b")


class KernelHashTable(Layout, size=0xB0):
    """Header and three entries, padded to 16 bytes; lengths are those of header plus entries, and of an entry."""

    table_guid = raw_bytes(0x00, 16, source=QEMU)
    table_length = u16(0x10, values=(0xA8,), source=QEMU)
    command_line_guid = raw_bytes(0x12, 16, source=QEMU)
    command_line_length = u16(0x22, values=(50,), source=QEMU)
    command_line_sha256 = raw_bytes(0x24, 32, doc="of the text with its NUL", source=QEMU)
    initrd_guid = raw_bytes(0x44, 16, source=QEMU)
    initrd_length = u16(0x54, values=(50,), source=QEMU)
    initrd_sha256 = raw_bytes(0x56, 32, source=QEMU)
    kernel_guid = raw_bytes(0x76, 16, source=QEMU)
    kernel_length = u16(0x86, values=(50,), source=QEMU)
    kernel_sha256 = raw_bytes(0x88, 32, source=QEMU)
    padding = raw_bytes(0xA8, 8, must_be_zero=True, source=QEMU)


def kernel_hash_table(kernel_sha256: bytes, initrd_sha256: bytes | None, command_line: str | None) -> bytes:
    """The table for a kernel; without an initrd the hash is that of nothing, without a command line that of one NUL."""
    return KernelHashTable.build(
        table_guid=TABLE_GUID,
        table_length=0xA8,
        command_line_guid=COMMAND_LINE_GUID,
        command_line_length=50,
        command_line_sha256=hashlib.sha256((command_line or "").encode() + b"\0").digest(),
        initrd_guid=INITRD_GUID,
        initrd_length=50,
        initrd_sha256=initrd_sha256 or hashlib.sha256().digest(),
        kernel_guid=KERNEL_GUID,
        kernel_length=50,
        kernel_sha256=kernel_sha256,
    )


def hash_page(table: bytes, table_gpa: int) -> bytes:
    """The 4096 bytes of the page that holds the table, else zero."""
    offset = table_gpa % PAGE_BYTES
    return (bytes(offset) + table).ljust(PAGE_BYTES, b"\0")
