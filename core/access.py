"""Who reaches memory how: one explicit path for each actor.

- the guest: its own page tables, then the nested ones, C-bit and key, then the check of the slot `access_check`;
  instruction fetches and page-table walks are always private in an encrypted guest;
- the hypervisor: system physical, C-bit of its choice (the SME key);
- the ASP: system physical with the C-bit in the address, or with a guest's key;
- DMA: system physical, never encrypted, whatever the page holds.

Source: spec 24593, 15.34 (key selection) and 15.36 (checks).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntFlag
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sevlab.core.buffers import SharedBuffer
from sevlab.core.cpu import CONTROL_NESTED_PAGING, FaultUnwind, Vcpu
from sevlab.core.crypto import MemoryKey
from sevlab.core.events import Fault, Party, Space
from sevlab.core.memory import TAG_ASP, TAG_DEVICE, TAG_HYPERVISOR, TAG_PUBLIC, split_pages
from sevlab.core.nested import NestedFault, NestedTables, NestedTranslation, nested_walk
from sevlab.core.paging import PHYSICAL_BITS, NonCanonical, PageFault, WalkAccess, paging_context, walk
from sevlab.core.svm import ExitCode, NpfError, Vector
from sevlab.core.units import HOST_ASID, MASK64, PAGE_BYTES, PAGE_MASK, PAGE_SHIFT

if TYPE_CHECKING:
    from sevlab.core.hypervisor import Vm
    from sevlab.core.machine import Machine


class Actor(Protocol):
    """Who accesses memory: the vCPU, or one of the constants below. `tag` is whose data its writes are."""

    @property
    def asid(self) -> int: ...
    @property
    def vmpl(self) -> int: ...
    @property
    def tag(self) -> int: ...


class HostActor(NamedTuple):
    """An actor outside the guests."""

    party: Party
    tag: int
    asid: int = HOST_ASID
    vmpl: int = 0


HYPERVISOR = HostActor(Party.HYPERVISOR, TAG_HYPERVISOR)
ASP = HostActor(Party.ASP, TAG_ASP)
DMA = HostActor(Party.DMA, TAG_DEVICE)


class AccessKind(IntFlag):
    """What an access is; the argument `kind` of the slot `access_check`."""

    READ = 0
    WRITE = 1 << 0
    FETCH = 1 << 1
    TABLE = 1 << 2
    """A page-table access by the walker."""
    PRIVATE = 1 << 3
    """The effective C-bit is 1."""
    LARGE = 1 << 4
    """The nested mapping is 2 MiB or larger."""
    USER = 1 << 5


# An operation on a flag enumeration costs ten times one on a number, and these are on the way of every access.
_WRITE, _FETCH, _TABLE, _PRIVATE, _LARGE, _USER = (
    int(bit)
    for bit in (
        AccessKind.WRITE,
        AccessKind.FETCH,
        AccessKind.TABLE,
        AccessKind.PRIVATE,
        AccessKind.LARGE,
        AccessKind.USER,
    )
)
_WALK_WRITE, _WALK_FETCH, _WALK_USER, _WALK_AC = (
    int(bit) for bit in (WalkAccess.WRITE, WalkAccess.FETCH, WalkAccess.USER, WalkAccess.AC)
)

_READ = 0
_record = tuple.__new__
"""Makes a NamedTuple from its values without the keyword machinery."""

GPA_NONE = -1
"""The `gpa` of a host access."""

CPL_USER = 3
RFLAGS_AC = 1 << 18


class Place(NamedTuple):
    """Where an access lands: system-physical address, the key it uses, whose data a write is."""

    spa: int
    key: MemoryKey | None
    tag: int


class Mapped(NamedTuple):
    """A nested translation as the access paths use it: `large` is the `LARGE` bit or 0, `refused` the bits of a kind
    that the mapping does not allow.
    """

    spa: int
    large: int
    refused: int
    host_c_bit: bool
    translation: NestedTranslation

    @classmethod
    def of(cls, found: NestedTranslation) -> Mapped:
        """What `found` allows."""
        refused = (0 if found.writable else _WRITE) | (_FETCH if found.no_execute else 0)
        large = _LARGE if found.page_bytes > PAGE_BYTES else 0
        return cls(found.spa, large, refused, found.host_c_bit, found)


class Path(NamedTuple):
    """A party's read (address, byte count) and write (address, data)."""

    read: Callable[[int, int], bytes]
    write: Callable[[int, bytes], None]


class Walker(Protocol):
    """A CPU engine's way to translate, with caches that the engine keeps in step with what its guest does."""

    def translate(self, vcpu: Vcpu, gva: int, kind: int) -> tuple[int, Place] | None:
        """(gpa, place) of `gva` as `Access.guest_linear` gives it; None: walk as always."""

    def forget(self) -> None:
        """The nested tables, or who may use which page, have changed."""


class Access:
    """The access paths of one machine.

    Reads and writes raise `FaultUnwind` where the architecture faults; a multi-page access checks every page before it
    changes the first.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._memory = machine.memory
        self._check = machine.slots.access_check
        self._key_of = machine.slots.key_of
        self._virtual_tom = machine.slots.virtual_tom
        self._host_c_bit = 1 << machine.config.part.c_bit
        self._nested: dict[tuple[int, int], Mapped] = {}
        self._kept: dict[tuple[int, int], tuple[Mapped, set[int]]] = {}
        """Translations of the marked state with the frames of their tables: good while none of these is written."""
        self._walked: set[int] = set()
        self.changes = 0
        """How often nested tables changed: who keeps a translation of its own compares."""
        self._tables: dict[int, NestedTables] = {}
        self.walker: Walker | None = None
        """Of the engine that executes a guest of this machine; asked first."""

    def forget(self) -> None:
        """Drop cached nested translations: after a change of nested tables, and at a reset.

        The next access finds what the tables hold then.
        """
        self.changes += 1
        self._nested.clear()
        self._tables.clear()
        if self.walker is not None:
            self.walker.forget()

    def mark(self) -> None:
        """The present tables are those that a reset returns to; as after a reset, nothing is cached."""
        self._kept.clear()
        self.forget()

    def key_of(self, asid: int, *, c_bit: bool) -> MemoryKey | None:
        """The key of an access with `asid` and effective C-bit; None: plaintext."""
        return self._key_of(asid, c_bit) if self._key_of is not None else None

    def check(self, actor: Actor, spa: int, gpa: int, kind: int) -> None:
        """Ask the slot `access_check` and raise what it answers."""
        if self._check is not None:
            fault = self._check(actor, spa, gpa, kind)
            if fault is not None:
                raise FaultUnwind(fault)

    # Nested tables ----------------------------------------------------------------------------------------------

    def new_nested_tables(self) -> NestedTables:
        """Fresh, empty nested page tables in hypervisor memory."""
        return NestedTables(self._allocate_table, self._read_table, self._write_table, c_bit_mask=self._host_c_bit)

    def nested_tables(self, vm: Vm) -> NestedTables:
        """The nested page tables of `vm`."""
        tables = self._tables.get(vm.npt_root)
        if tables is None:
            tables = NestedTables(
                self._allocate_table,
                self._read_table,
                self._write_table,
                c_bit_mask=self._host_c_bit,
                root_spa=vm.npt_root,
            )
            self._tables[vm.npt_root] = tables
        return tables

    def _allocate_table(self) -> int:
        return self._machine.hypervisor.allocate_pages(1)

    def _read_table(self, spa: int) -> int:
        self._walked.add(spa >> PAGE_SHIFT)
        return int.from_bytes(self._memory.read(spa, 8, None), "little")

    def _write_table(self, spa: int, value: int) -> None:
        self._memory.write(spa, value.to_bytes(8, "little"), None, TAG_HYPERVISOR)

    # Guest ------------------------------------------------------------------------------------------------------

    def nested(self, vcpu: Vcpu, gpa: int, kind: int, phase: int) -> NestedTranslation:
        """The nested translation of `gpa`; without nested paging guest-physical is system-physical.

        Raises `FaultUnwind` with vector 400h and the #NPF error code; `phase` is its bit 32 or 33.
        """
        return self._mapped(vcpu, gpa, int(kind), phase).translation

    def _mapped(self, vcpu: Vcpu, gpa: int, kind: int, phase: int) -> Mapped:
        """What `nested` says, kept until the tables change.

        A translation outlives a reset: at its first use afterwards none of its tables has been written since the mark,
        or they are walked again, so that it is what a walk would find.
        """
        vmcb = vcpu.vmcb
        if not vmcb.encryption_control & CONTROL_NESTED_PAGING:
            page_gpa = gpa & -PAGE_BYTES
            return Mapped.of(NestedTranslation(page_gpa, PAGE_BYTES, writable=True, no_execute=False, host_c_bit=False))
        page = (vmcb.nested_cr3, gpa & -PAGE_BYTES)
        known = self._nested.get(page)
        if known is not None and not kind & known.refused:
            return known
        kept = self._kept.get(page)
        if kept is not None and not kind & kept[0].refused and self._memory.unwritten(kept[1]):
            self._nested[page] = kept[0]
            return kept[0]
        self._walked.clear()
        access = (_WALK_WRITE if kind & _WRITE else 0) | (_WALK_FETCH if kind & _FETCH else 0)
        found = nested_walk(
            vmcb.nested_cr3,
            gpa & -PAGE_BYTES,
            access,
            read_entry=self._read_table,
            phase=phase,
            c_bit_mask=self._host_c_bit,
        )
        if isinstance(found, NestedFault):
            raise FaultUnwind(Fault(ExitCode.NPF, found.error_code, gpa))
        mapped = self._nested[page] = Mapped.of(found)
        if known is not None and known.spa != mapped.spa:
            self.changes += 1  # tables were written behind the back of a translation that is replaced now
        if self._memory.unwritten(self._walked):
            self._kept[page] = mapped, set(self._walked)
        return mapped

    def _private(self, vcpu: Vcpu) -> bool:
        return self._machine.hypervisor.vms[vcpu.vm_id].c_bit_mask != 0

    def guest_physical(self, vcpu: Vcpu, gpa: int, kind: int, *, phase: int = NpfError.FINAL) -> Place:
        """Where guest-physical `gpa` is in memory and under which key the guest reaches it.

        `kind` has `PRIVATE` set when the guest's effective C-bit is 1; then the guest's key wins whatever the nested
        C-bit says; a nested C-bit alone selects the host's key. Source: spec 24593, 15.34.2.
        """
        if type(kind) is not int:
            kind = int(kind)
        vmcb = vcpu.vmcb
        mapped = self._nested.get((vmcb.nested_cr3, gpa & -PAGE_BYTES))
        if mapped is None or kind & mapped.refused or not vmcb.encryption_control & CONTROL_NESTED_PAGING:
            mapped = self._mapped(vcpu, gpa, kind, phase)
        page_spa, large, _, host_c_bit, _ = mapped
        spa = page_spa + (gpa & PAGE_MASK)
        kind |= large
        if self._check is not None:
            fault = self._check(vcpu, spa, gpa, kind)
            if fault is not None:
                raise FaultUnwind(fault)
        if kind & _PRIVATE:
            return _record(Place, (spa, self.key_of(vmcb.guest_asid, c_bit=True), vcpu.tag))
        key = self.key_of(HOST_ASID, c_bit=True) if host_c_bit else None
        return _record(Place, (spa, key, TAG_PUBLIC))

    def guest_linear(self, vcpu: Vcpu, gva: int, kind: int) -> tuple[int, Place]:
        """(gpa, place) of linear address `gva`: guest page tables, then nested ones, then key and check.

        Raises `FaultUnwind`: #PF with its error code, #GP(0) for a non-canonical address, or what the nested walk or
        the slot `access_check` answers.
        """
        if self.walker is not None:
            found = self.walker.translate(vcpu, gva, kind)
            if found is not None:
                return found
        try:
            gpa, kind = self._walk_guest(vcpu, gva, kind)
            return gpa, self.guest_physical(vcpu, gpa, kind)
        except FaultUnwind as unwind:
            if unwind.fault.vector == Vector.VC:  # the guest's own exception: CR2 has the linear address
                raise FaultUnwind(unwind.fault._replace(address=gva)) from None
            raise

    def guest_gpa(self, vcpu: Vcpu, gva: int, kind: int) -> int:
        """The guest-physical address of `gva` by the guest's own tables alone; faults as `guest_linear`."""
        return self._walk_guest(vcpu, gva, kind)[0]

    def guest_page(self, vcpu: Vcpu, gva: int, kind: int) -> tuple[int, bool]:
        """As `guest_gpa`, and whether the C-bit of the guest's own tables makes the access a private one."""
        gpa, found = self._walk_guest(vcpu, gva, kind)
        return gpa, bool(found & _PRIVATE)

    def _walk_guest(self, vcpu: Vcpu, gva: int, kind: int) -> tuple[int, int]:
        """(gpa, kind with PRIVATE where the C-bit says so).

        With a virtual top of memory the address says so, and the C-bit of the guest's tables is a reserved bit.
        Source: spec 24593, 15.36.8.
        """
        system = vcpu.system
        mask = self._machine.hypervisor.vms[vcpu.vm_id].c_bit_mask
        top = 0 if self._virtual_tom is None else self._virtual_tom(vcpu)
        c_bit, width = (0, mask.bit_length() - 1) if top else (mask, PHYSICAL_BITS)
        context = paging_context(system.cr0, system.cr3, system.cr4, system.efer, c_bit, width)
        kind = int(kind)
        access = (
            (_WALK_WRITE if kind & _WRITE else 0)
            | (_WALK_FETCH if kind & _FETCH else 0)
            | (_WALK_USER if kind & _USER else 0)
            | (_WALK_AC if vcpu.regs.rflags & RFLAGS_AC else 0)
        )
        table_kind = _TABLE | (_PRIVATE if mask else 0) | kind & _USER

        def read_entry(gpa: int, width_bytes: int) -> int:
            place = self.guest_physical(vcpu, gpa, table_kind, phase=NpfError.TABLE_WALK)
            return int.from_bytes(self._memory.read(place.spa, width_bytes, place.key), "little")

        found = walk(context, gva, access, read_entry=read_entry)
        if isinstance(found, PageFault):
            raise FaultUnwind(Fault(Vector.PF, found.error_code, gva))
        if isinstance(found, NonCanonical):
            raise FaultUnwind(Fault(Vector.GP, 0, 0))
        for gpa, width_bytes, value in found.updates:
            place = self.guest_physical(vcpu, gpa, table_kind | _WRITE, phase=NpfError.TABLE_WALK)
            self._memory.write(place.spa, value.to_bytes(width_bytes, "little"), place.key, vcpu.tag)
        if found.c_bit or found.gpa < top or (mask and kind & _FETCH):
            kind |= _PRIVATE
        return found.gpa, kind

    def guest_read(self, vcpu: Vcpu, gva: int, length_bytes: int, kind: int = AccessKind.READ) -> bytes:
        """`length_bytes` bytes at linear `gva` as the guest sees them."""
        places = [
            (self.guest_linear(vcpu, start & MASK64, kind)[1], count) for start, count in split_pages(gva, length_bytes)
        ]
        return b"".join(self._memory.read(place.spa, count, place.key) for place, count in places)

    def guest_write(self, vcpu: Vcpu, gva: int, data: bytes, kind: int = AccessKind.WRITE) -> None:
        """Store `data` at linear `gva` as the guest does; nothing is written when any page of it faults."""
        places = [
            (self.guest_linear(vcpu, start & MASK64, kind)[1], count) for start, count in split_pages(gva, len(data))
        ]
        self._store(places, data)

    def guest_physical_read(self, vcpu: Vcpu, gpa: int, length_bytes: int, *, c_bit: bool) -> bytes:
        """`length_bytes` bytes at guest-physical `gpa`, reached with or without the C-bit."""
        kind = _PRIVATE if c_bit else 0
        places = [(self.guest_physical(vcpu, start, kind), count) for start, count in split_pages(gpa, length_bytes)]
        return b"".join(self._memory.read(place.spa, count, place.key) for place, count in places)

    def guest_physical_write(self, vcpu: Vcpu, gpa: int, data: bytes, *, c_bit: bool) -> None:
        """Store `data` at guest-physical `gpa`, reached with or without the C-bit."""
        kind = _WRITE | (_PRIVATE if c_bit else 0)
        self._store(
            [(self.guest_physical(vcpu, start, kind), count) for start, count in split_pages(gpa, len(data))], data
        )

    def _store(self, places: list[tuple[Place, int]], data: bytes) -> None:
        done = 0
        for place, count in places:
            self._memory.write(place.spa, data[done : done + count], place.key, place.tag)
            done += count

    # Hypervisor -------------------------------------------------------------------------------------------------

    def hypervisor_read(self, spa: int, length_bytes: int, *, c_bit: bool = False) -> bytes:
        """`length_bytes` bytes at `spa`; without the C-bit private pages show their ciphertext."""
        key = self.key_of(HOST_ASID, c_bit=c_bit)
        if self._check is not None:
            for start, _ in split_pages(spa, length_bytes):
                self.check(HYPERVISOR, start, GPA_NONE, _PRIVATE if c_bit else 0)
        return self._memory.read(spa, length_bytes, key)

    def hypervisor_write(self, spa: int, data: bytes, *, c_bit: bool = False) -> None:
        """Store `data` at `spa`; in a private page that spoils the touched 16-byte blocks for their owner."""
        key = self.key_of(HOST_ASID, c_bit=c_bit)
        if self._check is not None:
            kind = _WRITE | (_PRIVATE if c_bit else 0)
            for start, _ in split_pages(spa, len(data)):
                self.check(HYPERVISOR, start, GPA_NONE, kind)
        self._memory.write(spa, data, key, TAG_HYPERVISOR)

    def translate_gpa(self, vcpu: Vcpu, gpa: int) -> int | None:
        """SPA behind guest-physical `gpa` as the hypervisor finds it in its own tables; None where nothing is."""
        vmcb = vcpu.vmcb
        known = self._nested.get((vmcb.nested_cr3, gpa & -PAGE_BYTES))
        if known is not None and vmcb.encryption_control & CONTROL_NESTED_PAGING:
            return known.spa + (gpa & PAGE_MASK)
        try:
            return self._mapped(vcpu, gpa, _READ, 0).spa + (gpa & PAGE_MASK)
        except FaultUnwind:
            return None

    def shared_window(self, vcpu: Vcpu, gpa: int, length_bytes: int) -> SharedBuffer | None:
        """The hypervisor's counted window on guest memory that the guest can change meanwhile.

        None when the range is unmapped or not contiguous in system memory. What is private shows as ciphertext.
        """
        spa = self.translate_gpa(vcpu, gpa)
        if spa is None:
            return None
        for start, _ in split_pages(gpa, length_bytes):
            if self.translate_gpa(vcpu, start) != spa + (start - gpa):
                return None
        return SharedBuffer(self._machine.fetches, spa, length_bytes, None, TAG_HYPERVISOR)

    # ASP and DMA ------------------------------------------------------------------------------------------------

    def asp_place(self, address: int, length_bytes: int) -> Place | None:
        """Where the ASP finds `address`: the C-bit selects the host's key; None past the end of memory."""
        spa = address & ~self._host_c_bit
        if spa + length_bytes > self._memory.size_bytes:
            return None
        return Place(spa, None if spa == address else self.key_of(HOST_ASID, c_bit=True), TAG_ASP)

    def asp_fetch(self, address: int, length_bytes: int) -> bytes | None:
        """One counted fetch of memory by the ASP; None when the address is no memory."""
        place = self.asp_place(address, length_bytes)
        if place is None:
            return None
        return SharedBuffer(self._machine.fetches, place.spa, length_bytes, place.key, place.tag).read(0, length_bytes)

    def asp_store(self, address: int, data: bytes) -> bool:
        """Store by the ASP; False, and nothing written, when the address is no memory."""
        place = self.asp_place(address, len(data))
        if place is None:
            return False
        self._memory.write(place.spa, data, place.key, place.tag)
        return True

    def dma_read(self, spa: int, length_bytes: int) -> bytes:
        """What a device reads: the DRAM cells, ciphertext where a page is encrypted."""
        for start, _ in split_pages(spa, length_bytes):
            self.check(DMA, start, GPA_NONE, AccessKind.READ)
        return self._memory.read(spa, length_bytes, None)

    def dma_write(self, spa: int, data: bytes) -> None:
        """Store by a device: garbage to the owner of an encrypted page."""
        for start, _ in split_pages(spa, len(data)):
            self.check(DMA, start, GPA_NONE, AccessKind.WRITE)
        self._memory.write(spa, data, None, TAG_DEVICE)

    # Steps ------------------------------------------------------------------------------------------------------

    def path(self, party: int, space: int, vcpu: Vcpu | None, *, c_bit: bool) -> Path | None:
        """The read and write functions of a party for addresses of `space`; None where it has no such addresses."""
        if party == Party.GUEST and vcpu is not None:
            if space == Space.GVA:
                user = AccessKind.USER if vcpu.system.cpl == CPL_USER else AccessKind.READ
                return Path(
                    lambda gva, count: self.guest_read(vcpu, gva, count, user),
                    lambda gva, data: self.guest_write(vcpu, gva, data, AccessKind.WRITE | user),
                )
            if space == Space.GPA:
                return Path(
                    lambda gpa, count: self.guest_physical_read(vcpu, gpa, count, c_bit=c_bit),
                    lambda gpa, data: self.guest_physical_write(vcpu, gpa, data, c_bit=c_bit),
                )
        if space != Space.SPA:
            return None
        if party == Party.HYPERVISOR:
            return Path(
                lambda spa, count: self.hypervisor_read(spa, count, c_bit=c_bit),
                lambda spa, data: self.hypervisor_write(spa, data, c_bit=c_bit),
            )
        if party == Party.DMA:
            return Path(self.dma_read, self.dma_write)
        return None
