"""Page state change: its structure, and what the hypervisor does for one request, entry by entry.

Source: 56421, page state change; Linux arch/x86/kvm/svm/sev.c (snp_begin_psc, __snp_complete_one_psc) and
arch/x86/include/asm/sev-common.h.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.layout import Layout, bits, flag, u16, u32, u64
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES
from sevlab.plugins.snp.hypervisor import change_pages_at_once, make_private, make_shared, snp_hypervisor
from sevlab.plugins.snp.rmp import PAGES_PER_2M

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

SOURCE = "56421, page state change; Linux arch/x86/include/asm/sev-common.h"


class PscHeader(Layout, size=8):
    """Head of the structure; entries follow."""

    cur_entry = u16(0, doc="the hypervisor advances it", source=SOURCE)
    end_entry = u16(2, doc="index of the last entry", source=SOURCE)
    reserved_4 = u32(4, reserved=0xFFFF_FFFF, source=SOURCE)


class PscEntry(Layout, size=8):
    """One entry: a page of 4 KiB or 2 MiB."""

    cur_page = bits(0, u64, 11, 0, doc="pages of 4 KiB that are done", source=SOURCE)
    gfn = bits(0, u64, 51, 12, source=SOURCE)
    operation = bits(0, u64, 55, 52, values=(1, 2, 3, 4), source=SOURCE)
    page_size = flag(0, u64, 56, doc="1: 2 MiB", source=SOURCE)
    reserved_57 = bits(0, u64, 63, 57, must_be_zero=True, source=SOURCE)


PSC_LAYOUTS: tuple[type[Layout], ...] = (PscHeader, PscEntry)
MAX_ENTRIES = 253
"""As many as the shared buffer of a GHCB has room for."""


class PscOperation(IntEnum):
    """What an entry asks for. Source: 56421, page state change."""

    PRIVATE = 1
    SHARED = 2
    PSMASH = 3
    UNSMASH = 4


class PscResult(IntEnum):
    """SW_EXITINFO2 after a page state change. Source: Linux arch/x86/include/asm/sev-common.h."""

    SUCCESS = 0
    INVALID_HEADER = 0x1_0000_0001
    INVALID_ENTRY = 0x1_0000_0002
    GENERIC = 0x100_0000_0000


_HEADER = Struct("<HHI")
_ENTRY = Struct("<Q")
_CUR_PAGE = PscEntry.FIELDS["cur_page"].mask
_GFN = PscEntry.FIELDS["gfn"].mask
_LARGE = PscEntry.FIELDS["page_size"].mask
_OPERATION_SHIFT = PscEntry.FIELDS["operation"].low_bit


class PscEntryValue(NamedTuple):
    """One entry, decoded."""

    gfn: int
    operation: int
    large: bool = False
    cur_page: int = 0


def build_psc(entries: tuple[PscEntryValue, ...], *, cur_entry: int = 0) -> bytes:
    """The structure with these entries (1 to 253)."""
    words = (
        PscEntry.build(cur_page=entry.cur_page, gfn=entry.gfn, operation=entry.operation, page_size=int(entry.large))
        for entry in entries
    )
    return PscHeader.build(cur_entry=cur_entry, end_entry=len(entries) - 1) + b"".join(words)


def parse_psc(data: bytes) -> tuple[PscHeader, tuple[PscEntryValue, ...]]:
    """Header and entries of a structure; as many entries as `data` has and the header speaks of."""
    header = PscHeader.from_bytes(data[: PscHeader.SIZE])
    count = min(header.end_entry + 1, (len(data) - PscHeader.SIZE) // PscEntry.SIZE)
    entries = []
    for start in range(PscHeader.SIZE, PscHeader.SIZE + count * PscEntry.SIZE, PscEntry.SIZE):
        entry = PscEntry.from_bytes(data[start : start + PscEntry.SIZE])
        entries.append(PscEntryValue(entry.gfn, entry.operation, bool(entry.page_size), entry.cur_page))
    return header, tuple(entries)


def change_pages(machine: Machine, vcpu: Vcpu, data: bytes) -> tuple[int, bytes]:
    """What the hypervisor makes of a structure: SW_EXITINFO2, and the structure as far as it wrote to it.

    `data` is one snapshot, to the end of the buffer that it lies in: so many entries fit. The progress of each entry
    is written when it is done; a batch limit of the hypervisor's ends the exit early, with result 0 and CUR_ENTRY not
    past END_ENTRY. An unknown operation counts as done, as in KVM.
    Source: Linux arch/x86/kvm/svm/sev.c (snp_begin_psc).
    """
    cur_entry, end_entry, _ = _HEADER.unpack_from(data)
    room = min(MAX_ENTRIES, (len(data) - PscHeader.SIZE) // PscEntry.SIZE)
    if end_entry >= room:
        return PscResult.INVALID_HEADER, b""
    out = bytearray(data[: PscHeader.SIZE + (end_entry + 1) * PscEntry.SIZE])
    limit = snp_hypervisor(machine).psc_batch or MAX_ENTRIES
    words = [word for (word,) in _ENTRY.iter_unpack(bytes(out[PscHeader.SIZE :]))]
    result: int = PscResult.SUCCESS
    end = min(end_entry + 1, cur_entry + limit)
    while cur_entry < end and not result:
        count = _alike(words, cur_entry, end)
        gpas = [word & _GFN for word in words[cur_entry : cur_entry + count]]
        private = words[cur_entry] >> _OPERATION_SHIFT & 0xF == PscOperation.PRIVATE
        at_once = count > 1 and change_pages_at_once(machine, vcpu.vm_id, gpas, private=private)
        for word in words[cur_entry : cur_entry + count]:
            result = PscResult.SUCCESS if at_once else _change(machine, vcpu, word)
            if result:
                break
            done = PAGES_PER_2M if word & _LARGE else 1
            _ENTRY.pack_into(out, PscHeader.SIZE + cur_entry * PscEntry.SIZE, word & ~_CUR_PAGE | done)
            cur_entry += 1
    out[:2] = cur_entry.to_bytes(2, "little")
    return result, bytes(out)


def _alike(words: list[int], first: int, end: int) -> int:
    """How many entries from `first` on are fresh pages of 4 KiB, all different and of one operation; at least 1."""
    operation = words[first] & ~_GFN
    if operation >> _OPERATION_SHIFT not in (PscOperation.PRIVATE, PscOperation.SHARED) or operation & _CUR_PAGE:
        return 1
    seen: set[int] = set()
    for word in words[first:end]:
        if word & ~_GFN != operation or word in seen:
            break
        seen.add(word)
    return len(seen)


def _change(machine: Machine, vcpu: Vcpu, word: int) -> int:
    """One entry; a 2 MiB entry that has been begun goes on in 4 KiB."""
    large, cur_page, operation = bool(word & _LARGE), word & _CUR_PAGE, word >> _OPERATION_SHIFT & 0xF
    gpa = word & _GFN
    pages = PAGES_PER_2M if large else 1
    if cur_page > pages or (large and gpa % PAGE_2M_BYTES):
        return PscResult.INVALID_ENTRY
    if operation not in (PscOperation.PRIVATE, PscOperation.SHARED) or cur_page == pages:
        return PscResult.SUCCESS
    change = make_private if operation == PscOperation.PRIVATE else make_shared
    if large and not cur_page:
        return PscResult.SUCCESS if change(machine, vcpu.vm_id, gpa, large=True) else PscResult.GENERIC
    for number in range(cur_page, pages):
        if not change(machine, vcpu.vm_id, gpa + number * PAGE_BYTES, large=False):
            return PscResult.GENERIC
    return PscResult.SUCCESS
