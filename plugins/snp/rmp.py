"""The reverse map table: where it is, its entries, its initialisation.

The truth is the table in simulated memory, 16 bytes for each 4 KiB page after 16 KiB of page counters by ASID. Nothing
is kept beside it: an entry is decoded from the table's bytes whenever it is needed, so that a write to the table, by
whomever, counts at once.

Source: Linux arch/x86/virt/svm/sev.c; AMD-ASPFW sev_rmp.c; 24593, 15.36.3 and 15.36.4.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.memory import TAG_ASP, Memory
from sevlab.core.units import MASK64, PAGE_2M_BYTES, PAGE_BYTES, PAGE_MASK, PAGE_SHIFT
from sevlab.plugins.snp.layout import (
    ASID,
    ASID_SHIFT,
    ASSIGNED,
    GPA,
    IMMUTABLE,
    PAGE_SIZE,
    SUBPAGE_COUNT,
    SUBPAGE_SHIFT,
    VMSA,
)
from sevlab.plugins.snp.states import (
    GUEST_STATES,
    PAGE_STATES,
    STATE_BITS,
    PageEvent,
    PageState,
    page_state,
    snp_state,
)

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

BOOKKEEPING_BYTES = 0x4000
ENTRY_BYTES = 16
PAGES_PER_2M = PAGE_2M_BYTES // PAGE_BYTES
RMP_ALIGNMENT_BYTES = 1 << 20
"""What the firmware asks of RMP_BASE; the processor is content with 8 KiB."""

PAIR = Struct("<QQ")
_COUNTER = Struct("<Q")


class Entry(NamedTuple):
    """The two words of an entry; `high` holds the permissions, a byte for each VMPL."""

    low: int
    high: int

    @property
    def state(self) -> PageState:
        """The page's state."""
        return page_state(self.low)

    @property
    def asid(self) -> int:
        """The owner's ASID; 0: no guest's."""
        return (self.low & ASID) >> ASID_SHIFT

    @property
    def gpa(self) -> int:
        """The guest-physical address at which the owner has the page."""
        return self.low & GPA

    @property
    def huge(self) -> bool:
        """Whether the page has 2 MiB."""
        return bool(self.low & PAGE_SIZE)

    def permissions(self, vmpl: int) -> int:
        """The permission byte of `vmpl`."""
        return self.high >> 8 * vmpl & 0xFF


def entry_address(machine: Machine, spa: int) -> int | None:
    """Where the entry of the page at `spa` is; None: the table does not cover it. Source: 24593, 15.36.4."""
    state = snp_state(machine)
    address = state.rmp_base + BOOKKEEPING_BYTES + (spa >> PAGE_SHIFT) * ENTRY_BYTES
    return address if state.rmp_base and address + ENTRY_BYTES - 1 <= state.rmp_end else None


def read_entry(machine: Machine, spa: int) -> Entry | None:
    """The entry of the page at `spa`; None: the table does not cover it."""
    address = entry_address(machine, spa)
    if address is None:
        return None
    memory = machine.memory
    page = memory.pages.get(address >> PAGE_SHIFT)
    if page is not None and page.key is None and type(memory) is Memory:  # modelled caches stand before the pages
        return Entry(*PAIR.unpack_from(page.data, address & PAGE_MASK))
    return Entry(*PAIR.unpack(memory.read(address, ENTRY_BYTES, None)))


def write_entry(machine: Machine, spa: int, low: int, high: int) -> None:
    """Store the entry of a page that the table covers."""
    address = entry_address(machine, spa)
    assert address is not None
    machine.memory.write(address, PAIR.pack(low, high), None, TAG_ASP)


def region_of(spa: int) -> int:
    """SPA of the 2 MiB region that the page is in."""
    return spa & -PAGE_2M_BYTES


def owning_entry(machine: Machine, spa: int) -> tuple[int, Entry] | None:
    """(SPA, entry) that rules the page at `spa`: the region's first where that is a 2 MiB page, else its own."""
    entry = read_entry(machine, spa)
    if entry is None:
        return None
    if entry.low & (ASSIGNED | ASID) == ASSIGNED:  # only a page without an owner can be a part of a large one
        head = read_entry(machine, region_of(spa))
        if head is not None and head.huge and head.low & ASSIGNED:
            return region_of(spa), head
    return spa & -PAGE_BYTES, entry


def state_of(machine: Machine, spa: int) -> PageState:
    """The state of the page at `spa`."""
    found = owning_entry(machine, spa)
    return PageState.DEFAULT if found is None else found[1].state


def overlaps_rmp(machine: Machine, spa: int, length_bytes: int) -> bool:
    """Whether the range touches the table itself."""
    state = snp_state(machine)
    return bool(state.rmp_base) and spa <= state.rmp_end and spa + length_bytes > state.rmp_base


def change_state(machine: Machine, spa: int, event: PageEvent, *, context_spa: int = 0) -> bool:
    """Let the ASP do `event` to the page at `spa`; False, and nothing changed, where its state does not admit it.

    A guest's page keeps ASID, GPA, size, VMSA and permissions while it stays a guest's. A page that becomes Metadata
    gets the SPA of its guest's context page as GPA. Source: `PAGE_STATES`; AMD-ASPFW sev_rmp.c.
    """
    found = owning_entry(machine, spa)
    if found is None:
        return False
    spa, (low, high) = found
    target = PAGE_STATES.next(page_state(low), event)
    if target is None:
        return False
    kept = PAGE_SIZE | SUBPAGE_COUNT
    if target in GUEST_STATES:
        kept |= ASID | GPA | VMSA
    tied = context_spa & GPA if target is PageState.METADATA else 0
    write_entry(machine, spa, low & kept | STATE_BITS[target] | tied, high if target in GUEST_STATES else 0)
    return True


def fill_region(machine: Machine, spa: int, low: int, high: int) -> None:
    """Make the 2 MiB at `spa` one page: the first entry rules, the others only read as assigned.

    Source: AMD-ASPFW sev_rmp.c.
    """
    address = entry_address(machine, spa)
    assert address is not None
    others = PAIR.pack(ASSIGNED if low & ASSIGNED else 0, 0) * (PAGES_PER_2M - 1)
    machine.memory.write(address, PAIR.pack(low, high) + others, None, TAG_ASP)


def smash_region(machine: Machine, spa: int, head: Entry) -> None:
    """Make the 2 MiB page at `spa` 512 pages of 4 KiB in the same state. Source: 24593, 15.36.11 (PSMASH)."""
    address = entry_address(machine, spa)
    assert address is not None
    low = head.low & ~(PAGE_SIZE | SUBPAGE_COUNT)
    first = PAIR.pack(low | (PAGES_PER_2M - 1) << SUBPAGE_SHIFT, head.high)
    rest = b"".join(PAIR.pack(low + number * PAGE_BYTES, head.high) for number in range(1, PAGES_PER_2M))
    machine.memory.write(address, first + rest, None, TAG_ASP)


def count_subpage(machine: Machine, spa: int, change: int) -> None:
    """Keep the number of assigned 4 KiB pages in the region's first entry.

    Nine bits cannot count 512, so the first page itself is not counted. UNVERIFIED.
    """
    region = region_of(spa)
    if spa == region or not change:
        return
    head = read_entry(machine, region)
    assert head is not None
    count = head.low + (change << SUBPAGE_SHIFT) & SUBPAGE_COUNT
    write_entry(machine, region, head.low & ~SUBPAGE_COUNT | count, head.high)


def asid_pages(machine: Machine, asid: int) -> int:
    """How many pages of 4 KiB the RMP counts for `asid`. Source: AMD-ASPFW sev_rmp.c."""
    address = snp_state(machine).rmp_base + asid * _COUNTER.size
    return _COUNTER.unpack(machine.memory.read(address, _COUNTER.size, None))[0]  # type: ignore[no-any-return]


def count_asid(machine: Machine, asid: int, change: int) -> None:
    """Change the page counter of `asid`; that a 2 MiB page counts as 512 is UNVERIFIED."""
    if asid and change:
        address = snp_state(machine).rmp_base + asid * _COUNTER.size
        pages = (asid_pages(machine, asid) + change) & MASK64
        machine.memory.write(address, _COUNTER.pack(pages), None, TAG_ASP)


def rmp_bytes_for(memory_bytes: int) -> int:
    """Size of a table that covers `memory_bytes` of memory."""
    return BOOKKEEPING_BYTES + (memory_bytes >> PAGE_SHIFT) * ENTRY_BYTES


def initialize_rmp(machine: Machine, fixed: tuple[tuple[int, int], ...] = ()) -> None:
    """Fill the table as SNP_INIT does: DRAM to the hypervisor, `fixed` ranges HV-Fixed, the table itself Firmware.

    `fixed` pairs (SPA, page count). What the table covers beyond DRAM is HV-Fixed.
    Source: AMD-ASPFW sev_rmp.c; 56860, SNP_INIT_EX.
    """
    state = snp_state(machine)
    covered = (state.rmp_end + 1 - state.rmp_base - BOOKKEEPING_BYTES) // ENTRY_BYTES
    dram = machine.memory.size_bytes >> PAGE_SHIFT
    _clear(machine, state.rmp_base, BOOKKEEPING_BYTES + min(covered, dram) * ENTRY_BYTES)
    if covered > dram:
        _fill(machine, dram, covered - dram, IMMUTABLE)
    for spa, count in fixed:
        _fill(machine, spa >> PAGE_SHIFT, min(count, covered - (spa >> PAGE_SHIFT)), IMMUTABLE)
    own = (state.rmp_end + 1 - state.rmp_base + PAGE_BYTES - 1) >> PAGE_SHIFT
    _fill(machine, state.rmp_base >> PAGE_SHIFT, own, ASSIGNED | IMMUTABLE)


def _clear(machine: Machine, address: int, length_bytes: int) -> None:
    """Zero a range; pages that were never written are left alone, as they read zero already."""
    memory = machine.memory
    end = address + length_bytes
    while address < end:
        count = min(end - address, PAGE_BYTES - address % PAGE_BYTES)
        if memory.pages.get(address >> PAGE_SHIFT) is not None:
            memory.write(address, bytes(count), None, TAG_ASP)
        address += count


def _fill(machine: Machine, first_page: int, count: int, low: int) -> None:
    address = snp_state(machine).rmp_base + BOOKKEEPING_BYTES + first_page * ENTRY_BYTES
    machine.memory.write(address, PAIR.pack(low, 0) * max(count, 0), None, TAG_ASP)
