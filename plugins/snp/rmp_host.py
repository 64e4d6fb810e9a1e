"""RMPUPDATE, PSMASH and RMPREAD: how the hypervisor assigns pages, and what it may not touch.

All are instructions of the host at CPL 0; without SYSCFG.SNPEn they are #UD. Result codes beyond those that Linux
names, and the order of checks, follow 24593, volume 3, as far as its readers report it; what is marked UNVERIFIED no
source confirms.

Source: 24593, 15.36.5 and 15.36.11; Linux arch/x86/virt/svm/sev.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.events import Data, Fault, Faulted, Refused
from sevlab.core.memory import TAG_ASP, Memory
from sevlab.core.svm import Vector
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES, PAGE_MASK, PAGE_SHIFT, is_aligned
from sevlab.plugins.sme import sme_state
from sevlab.plugins.snp.layout import (
    ASID,
    ASID_SHIFT,
    ASSIGNED,
    GPA,
    IMMUTABLE,
    PAGE_SIZE,
    PERM_ALL,
    SUBPAGE_COUNT,
    RmpState,
)
from sevlab.plugins.snp.records import Psmash, RmpRead, RmpResult, RmpUpdate
from sevlab.plugins.snp.rmp import (
    BOOKKEEPING_BYTES,
    ENTRY_BYTES,
    PAGES_PER_2M,
    PAIR,
    Entry,
    count_asid,
    count_subpage,
    fill_region,
    read_entry,
    region_of,
    smash_region,
    write_entry,
)
from sevlab.plugins.snp.rmp_check import SNP_EN
from sevlab.plugins.snp.states import snp_state

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

MAX_ASID = ASID >> ASID_SHIFT


class RmpCode(IntEnum):
    """RAX after an RMP instruction. Source: Linux arch/x86/include/asm/sev.h; coconut-svsm kernel/src/sev/utils.rs."""

    SUCCESS = 0
    FAIL_INPUT = 1
    FAIL_PERMISSION = 2
    FAIL_INUSE = 3
    FAIL_OVERLAP = 4
    """RMPUPDATE; the same number is FAIL_BADADDR for PSMASH."""
    FAIL_SIZEMISMATCH = 6


FAIL_BADADDR = 4


def snp_enabled(machine: Machine) -> bool:
    """Whether SYSCFG.SNPEn is set: RMP checks are on. Source: 24593, 15.36.2."""
    return bool(sme_state(machine).syscfg & SNP_EN)


def undefined_without_snp(machine: Machine) -> bool:
    """Answer #UD while SNPEn is clear. UNVERIFIED."""
    if snp_enabled(machine):
        return False
    machine.emit(Faulted(*Fault(Vector.UD, 0, 0)))
    return True


def in_use(machine: Machine, spa: int, length_bytes: int) -> bool:
    """Whether the range holds the VMSA of a vCPU that is in its guest. Source: 24593, 15.36.12."""
    return any(spa <= vmsa_spa < spa + length_bytes for vmsa_spa in running_save_areas(machine))


def running_save_areas(machine: Machine) -> list[int]:
    """SPAs of the VMSAs of vCPUs that are in their guest."""
    areas = []
    for vcpu_id, snp in snp_state(machine).vcpus.items():
        vcpu = machine.vcpus.get(vcpu_id)
        if vcpu is not None and not (vcpu.halted or vcpu.stopped):
            areas.append(snp.vmsa_spa)
    return areas


class NewState(NamedTuple):
    """What RMPUPDATE asks for, checked."""

    low: int
    length_bytes: int

    @property
    def asid(self) -> int:
        """The new owner."""
        return (self.low & ASID) >> ASID_SHIFT


def requested_state(state: RmpState, spa: int) -> NewState | None:
    """The entry word that the 16 bytes at RCX ask for; None: FAIL_INPUT.

    An unassigned page may be nothing else, a page of ASID 0 that only the ASP may change must have GPA 0 (it would be
    a metadata page else). Both, and the answer to reserved bits, are UNVERIFIED. Source: 24593, 15.36.5.
    """
    length_bytes = PAGE_2M_BYTES if state.page_size else PAGE_BYTES
    malformed = (
        state.assigned > 1
        or state.immutable > 1
        or state.page_size_reserved
        or state.huge_region
        or state.reserved
        or state.asid > MAX_ASID
        or state.gpa & ~GPA
        or not is_aligned(state.gpa, length_bytes)
        or not is_aligned(spa, length_bytes)
    )
    if malformed:
        return None
    if not state.assigned:
        return None if state.immutable or state.asid else NewState(0, length_bytes)
    if not state.asid and state.immutable and state.gpa:
        return None
    low = ASSIGNED | state.gpa | state.asid << ASID_SHIFT
    low |= (IMMUTABLE if state.immutable else 0) | (PAGE_SIZE if state.page_size else 0)
    return NewState(low, length_bytes)


KEPT_WITH = ASSIGNED | PAGE_SIZE | GPA | ASID
"""An update that leaves these as they are keeps `validated`, VMSA and permissions. Source: 24593, 15.36.5."""


def rmp_update(machine: Machine, spa: int, state: RmpState) -> RmpCode:
    """RMPUPDATE of the page at `spa` with the 16 bytes at RCX.

    Order: input, coverage, immutable, overlap of page sizes, in use. A new guest page is not validated and gives
    VMPL0 all rights, others none. Source: 24593, 15.36.5; the order is UNVERIFIED.
    """
    spa &= -PAGE_BYTES
    new = requested_state(state, spa)
    return RmpCode.FAIL_INPUT if new is None else update(machine, spa, new)


def update(machine: Machine, spa: int, new: NewState) -> RmpCode:
    """The rest of RMPUPDATE: from coverage on."""
    entry = read_entry(machine, spa)
    head = read_entry(machine, region_of(spa))
    if entry is None or head is None or read_entry(machine, spa + new.length_bytes - PAGE_BYTES) is None:
        return RmpCode.FAIL_INPUT
    head_is_large = bool(head.low & ASSIGNED and head.huge)
    if (head if head_is_large else entry).low & IMMUTABLE:
        return RmpCode.FAIL_PERMISSION
    large = new.length_bytes == PAGE_2M_BYTES
    if large != head_is_large and (head_is_large or head.low & (ASSIGNED | SUBPAGE_COUNT)):
        return RmpCode.FAIL_OVERLAP
    if large and not head_is_large and _any_fixed(machine, spa):
        return RmpCode.FAIL_PERMISSION
    if in_use(machine, spa, new.length_bytes):
        return RmpCode.FAIL_INUSE
    _store(machine, spa, entry, new)
    return RmpCode.SUCCESS


def _any_fixed(machine: Machine, region: int) -> bool:
    """Whether any 4 KiB page of an unassigned region is HV-Fixed."""
    for number in range(PAGES_PER_2M):
        entry = read_entry(machine, region + number * PAGE_BYTES)
        if entry is not None and entry.low & IMMUTABLE:
            return True
    return False


def _store(machine: Machine, spa: int, entry: Entry, new: NewState) -> None:
    low, high = new.low, PERM_ALL if new.asid else 0
    if low & ASSIGNED and not (entry.low ^ low) & KEPT_WITH:
        low, high = entry.low & ~IMMUTABLE | low & IMMUTABLE, entry.high
    pages = new.length_bytes // PAGE_BYTES
    if entry.asid != new.asid:
        count_asid(machine, entry.asid if entry.low & ASSIGNED else 0, -pages)
        count_asid(machine, new.asid, pages)
    if pages > 1:
        fill_region(machine, spa, low, high)
        return
    write_entry(machine, spa, low | entry.low & SUBPAGE_COUNT, high)
    count_subpage(machine, spa, (low & ASSIGNED) - (entry.low & ASSIGNED))


def update_pages(machine: Machine, spas: Sequence[int], new: Sequence[int]) -> bool:
    """RMPUPDATE of many different pages of 4 KiB at once, each to its word of `new`; False: nothing was done.

    Only for what needs no thought: pages outside of 2 MiB pages that all are the hypervisor's and become one guest's,
    or all are one guest's and become the hypervisor's. The table is then as after one update for each, but an entry
    costs one look and one store, and the counters are written once for a guest and a region.
    """
    memory, base, end = machine.memory, snp_state(machine).rmp_base, snp_state(machine).rmp_end
    if type(memory) is not Memory or not base or not set(spas).isdisjoint(running_save_areas(machine)):
        return False
    asid = (new[0] & ASID) >> ASID_SHIFT
    wanted, owner, places, counts = 0 if asid else None, asid, [], dict[int, int]()
    for spa in spas:
        address = base + BOOKKEEPING_BYTES + (spa >> PAGE_SHIFT) * ENTRY_BYTES
        page = memory.pages.get(address >> PAGE_SHIFT)
        if address + ENTRY_BYTES - 1 > end or (page is not None and page.key is not None):
            return False
        low = 0 if page is None else PAIR.unpack_from(page.data, address & PAGE_MASK)[0]
        if wanted is None:
            wanted, owner = low & ASID | ASSIGNED, (low & ASID) >> ASID_SHIFT
        if not owner or low & _SAME != wanted:
            return False
        places.append((address, low & SUBPAGE_COUNT))
        region = spa & -PAGE_2M_BYTES
        counts[region] = counts.get(region, 0) + (spa != region)
    heads = [read_entry(machine, region) for region in counts]
    if any(head is None or (head.low & ASSIGNED and head.huge) for head in heads):
        return False
    high = PERM_ALL if asid else 0
    for (address, kept), low in zip(places, new, strict=True):
        memory.write(address, PAIR.pack(low | kept, high), None, TAG_ASP)
    count_asid(machine, owner, len(places) if asid else -len(places))
    for region, count in counts.items():
        count_subpage(machine, region + PAGE_BYTES, count if asid else -count)
    return True


_SAME = ASSIGNED | PAGE_SIZE | IMMUTABLE | ASID


def psmash(machine: Machine, spa: int) -> int:
    """PSMASH of the 2 MiB page at `spa`; RAX. The state of every part is that of the whole.

    Source: 24593, 15.36.11; Linux arch/x86/virt/svm/sev.c. The codes for a page that is no guest's or
    has 4 KiB, and for an immutable one, are UNVERIFIED.
    """
    if not is_aligned(spa, PAGE_2M_BYTES):
        return RmpCode.FAIL_INPUT
    head = read_entry(machine, spa)
    if head is None or read_entry(machine, spa + PAGE_2M_BYTES - PAGE_BYTES) is None:
        return FAIL_BADADDR
    if not head.low & ASSIGNED or not head.huge or not head.asid:
        return RmpCode.FAIL_INPUT
    if head.low & IMMUTABLE:
        return RmpCode.FAIL_PERMISSION
    if in_use(machine, spa, PAGE_2M_BYTES):
        return RmpCode.FAIL_INUSE
    smash_region(machine, spa, head)
    return RmpCode.SUCCESS


def rmp_read(machine: Machine, spa: int) -> bytes | None:
    """The architectural part of the entry of the page at `spa`; None: not covered.

    Source: Linux arch/x86/virt/svm/sev.c. The meaning of the region bit is UNVERIFIED.
    """
    entry = read_entry(machine, spa)
    head = read_entry(machine, region_of(spa))
    if entry is None or head is None:
        return None
    return RmpState.build(
        gpa=entry.gpa,
        assigned=entry.low & ASSIGNED,
        page_size=int(entry.huge),
        huge_region=int(head.huge),
        immutable=int(bool(entry.low & IMMUTABLE)),
        asid=entry.asid,
    )


def rmpupdate_step(machine: Machine, step: RmpUpdate) -> None:
    """The host executes RMPUPDATE."""
    if undefined_without_snp(machine):
        return
    if len(step.state) != RmpState.SIZE:
        machine.emit(Refused(f"RMPUPDATE reads {RmpState.SIZE} bytes, not {len(step.state)}"))
        return
    machine.emit(RmpResult(rmp_update(machine, step.rax, RmpState.from_bytes(step.state)), False))


def psmash_step(machine: Machine, step: Psmash) -> None:
    """The host executes PSMASH."""
    if not undefined_without_snp(machine):
        machine.emit(RmpResult(psmash(machine, step.rax), False))


def rmpread_step(machine: Machine, step: RmpRead) -> None:
    """The host executes RMPREAD; a page without an entry is FAIL_INPUT. UNVERIFIED."""
    if undefined_without_snp(machine):
        return
    found = rmp_read(machine, step.rax)
    if found is None:
        machine.emit(RmpResult(RmpCode.FAIL_INPUT, False))
        return
    machine.emit(RmpResult(RmpCode.SUCCESS, False))
    machine.emit(Data(found))
