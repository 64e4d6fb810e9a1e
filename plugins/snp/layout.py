"""The RMP's structures: an entry as the table holds it, and a page's state as RMPUPDATE and RMPREAD exchange it."""

from __future__ import annotations

from sevlab.core.layout import Layout, bits, flag, u8, u32, u64

_ENTRY = "AMDESE/sev-tool src/rmp.h; Linux arch/x86/virt/svm/sev.c"
_STATE = "Linux arch/x86/virt/svm/sev.c; 24593, 15.36.5"


class RmpEntry(Layout, size=16):
    """An entry of the reverse map table, as the parts keep it in memory.

    The format is not architectural: software reads entries with RMPREAD.
    """

    assigned = flag(0, u64, 0, source=_ENTRY)
    page_size = flag(0, u64, 1, doc="1: the page has 2 MiB", source=_ENTRY)
    immutable = flag(0, u64, 2, doc="only the ASP changes it", source=_ENTRY)
    subpage_count = bits(0, u64, 11, 3, doc="assigned 4 KiB pages of a 2 MiB region, in its first entry", source=_ENTRY)
    gpa_page = bits(0, u64, 50, 12, doc="guest page number", source=_ENTRY)
    asid = bits(0, u64, 60, 51, source=_ENTRY)
    vmsa = flag(0, u64, 61, source=_ENTRY)
    validated = flag(0, u64, 62, source=_ENTRY)
    lock = flag(0, u64, 63, doc="the ASP works on the entry", source=_ENTRY)
    vmpl0 = u8(8, doc="permissions of VMPL0", source=_ENTRY)
    vmpl1 = u8(9, doc="permissions of VMPL1", source=_ENTRY)
    vmpl2 = u8(10, doc="permissions of VMPL2", source=_ENTRY)
    vmpl3 = u8(11, doc="permissions of VMPL3", source=_ENTRY)
    key_select = flag(8, u64, 32, doc="Genoa", source="AMD-ASPFW sev_rmp.h")
    root_port = bits(8, u64, 53, 49, doc="Genoa, SEV-TIO", source="AMD-ASPFW sev_rmp.h")
    ide_stream = bits(8, u64, 61, 54, doc="Genoa, SEV-TIO", source="AMD-ASPFW sev_rmp.h")
    migration = bits(8, u64, 63, 62, doc="Genoa", source="AMD-ASPFW sev_rmp.h")


class RmpState(Layout, size=16):
    """What RMPUPDATE takes and RMPREAD gives: the architectural part of an entry."""

    gpa = u64(0, aligned=4096, doc="guest-physical address", source=_STATE)
    assigned = u8(8, values=(0, 1), source=_STATE)
    page_size = flag(9, u8, 0, doc="1: the page has 2 MiB", source=_STATE)
    huge_region = flag(9, u8, 1, doc="RMPREAD: the 2 MiB region is one page", source=_STATE)
    page_size_reserved = bits(9, u8, 7, 2, must_be_zero=True, source=_STATE)
    immutable = u8(10, values=(0, 1), source=_STATE)
    reserved = u8(11, reserved=0xFF, source=_STATE)
    asid = u32(12, doc="0: not a guest's", source=_STATE)


def _mask(name: str) -> int:
    return RmpEntry.FIELDS[name].mask


ASSIGNED = _mask("assigned")
PAGE_SIZE = _mask("page_size")
IMMUTABLE = _mask("immutable")
SUBPAGE_COUNT = _mask("subpage_count")
GPA = _mask("gpa_page")
ASID = _mask("asid")
VMSA = _mask("vmsa")
VALIDATED = _mask("validated")
LOCK = _mask("lock")
"""Masks in the low word of an entry."""

ASID_SHIFT = RmpEntry.FIELDS["asid"].low_bit
SUBPAGE_SHIFT = RmpEntry.FIELDS["subpage_count"].low_bit

PERM_READ = 1 << 0
PERM_WRITE = 1 << 1
PERM_EXECUTE_USER = 1 << 2
PERM_EXECUTE_SUPERVISOR = 1 << 3
PERM_SUPERVISOR_SHADOW_STACK = 1 << 4
"""Bits of a VMPL's permission byte. Source: 24593, 15.36.7."""
PERM_ALL = PERM_READ | PERM_WRITE | PERM_EXECUTE_USER | PERM_EXECUTE_SUPERVISOR
PERM_DEFINED = PERM_ALL | PERM_SUPERVISOR_SHADOW_STACK
