"""Guest modes without a loader: flat segments, and identity page tables in the guest's own memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.paging import CR0_PG, CR4_PAE, EFER_LME
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

CR0_PE, CR0_ET, CR0_WP = 1, 0x10, 1 << 16
EFER_SVME = 1 << 12
CODE_32, CODE_64, DATA = 0xC9B, 0xA9B, 0xC93
TABLES_FROM_END = 8
"""The page tables begin this many pages before the end of memory."""
PRESENT_WRITABLE, LARGE = 0x23, 0x80
"""Present, writable, accessed; and a page of 2 MiB."""


def _flat(vcpu: Vcpu, code: int) -> None:
    vcpu.system.cs = (8, code, 0xFFFF_FFFF, 0)
    vcpu.system.ds = vcpu.system.es = vcpu.system.ss = (16, DATA, 0xFFFF_FFFF, 0)
    vcpu.system.cpl = 0


def enter_protected_mode(vcpu: Vcpu) -> None:
    """32-bit flat without paging, as PVH guests start."""
    _flat(vcpu, CODE_32)
    vcpu.system.cr0 = CR0_PE | CR0_ET


def enter_long_mode(machine: Machine, vcpu: Vcpu, *, shared: tuple[int, ...] = ()) -> None:
    """64-bit with identity page tables over the guest's memory, written by the guest itself.

    In an encrypted guest the tables are private, and map everything as private except the 2 MiB pages that hold a
    guest-physical address of `shared`.
    """
    vm = machine.vm_of(vcpu)
    tables = vm.memory_bytes - TABLES_FROM_END * PAGE_BYTES
    c_bit = vm.c_bit_mask
    directory = tables + 2 * PAGE_BYTES
    entries = {
        tables: tables + PAGE_BYTES | PRESENT_WRITABLE | c_bit,
        tables + PAGE_BYTES: directory | PRESENT_WRITABLE | c_bit,
    }
    for index in range(min(-(-vm.memory_bytes // PAGE_2M_BYTES), 512)):
        page = index * PAGE_2M_BYTES
        private = 0 if any(page <= gpa < page + PAGE_2M_BYTES for gpa in shared) else c_bit
        entries[directory + index * 8] = page | PRESENT_WRITABLE | LARGE | private
    for gpa, entry in entries.items():
        machine.access.guest_physical_write(vcpu, gpa, entry.to_bytes(8, "little"), c_bit=bool(c_bit))
    _flat(vcpu, CODE_64)
    system = vcpu.system
    system.cr3 = tables | c_bit
    system.cr4 = CR4_PAE
    system.efer = EFER_LME | EFER_SVME | 1 << 10
    system.cr0 = CR0_PE | CR0_ET | CR0_WP | CR0_PG
