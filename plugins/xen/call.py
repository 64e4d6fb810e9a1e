"""One hypercall: who calls, in which ABI, its buffers, its continuation.

Legacy ABI: a handle is a linear address. Xen walks the guest's page tables to it - and both the tables and the buffer
are ciphertext to it when the guest is encrypted, and CR3 itself cannot be read under SEV-ES. Physical-address ABI: a
handle is a guest-physical address; the buffer must be shared. FastABI: arguments and results are in registers.
Source: Xen xen/arch/x86/hvm/hvm.c (__hvm_copy, copy_to/from_user_hvm), xen/arch/x86/hypercall.c
(hypercall_create_continuation); Vates's series for the other two.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any

from sevlab.core.memory import TAG_HYPERVISOR, split_pages
from sevlab.core.units import MASK32, MASK64, PAGE_BYTES, PAGE_MASK, PAGE_SHIFT
from sevlab.plugins.xen.frames import fetch, may_write, page_of
from sevlab.plugins.xen.numbers import Domid
from sevlab.plugins.xen.state import Domain, PageKind, XenVcpu, xen

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.hypercall import HypercallFrame
    from sevlab.core.layout import Layout
    from sevlab.core.machine import Machine
    from sevlab.plugins.xen.arguments import Shape
    from sevlab.plugins.xen.linear import Walks

MAX_COPY_BYTES = 1 << 20
"""No hypercall copies more at once; a longer request is a fault here."""


class Abi(Enum):
    """How arguments travel."""

    LEGACY = "legacy"
    PHYSICAL = "physical"
    FAST = "fast"


LEGACY, SELF = Abi.LEGACY, int(Domid.SELF)
"""By name alone: the look at an enumeration's member costs more than the rest of the question."""


class Call:
    """A hypercall under way. `args` are up to five numbers, cut to the caller's width; handlers return 0 or more, or
    a negated `Errno`.
    """

    __slots__ = (
        "abi",
        "args",
        "continuation",
        "debug_build",
        "domain",
        "frame",
        "in_multicall",
        "left",
        "machine",
        "me",
        "narrow",
        "number",
        "places",
        "vcpu",
        "walks",
    )

    def __init__(  # positional: made at every hypercall
        self,
        machine: Machine,
        vcpu: Vcpu,
        domain: Domain,
        me: XenVcpu,
        frame: HypercallFrame,
        abi: Abi,
        narrow: bool,  # noqa: FBT001
        left: int,
        debug_build: bool,  # noqa: FBT001
        walks: Walks,
        number: int,
        args: tuple[int, ...],
    ) -> None:
        self.machine = machine
        self.vcpu = vcpu
        self.domain = domain
        self.me = me
        self.frame = frame
        self.abi = abi
        self.narrow = narrow
        self.left = left
        self.debug_build = debug_build
        self.walks = walks
        self.number = number
        self.args = args
        self.in_multicall = False
        self.places: dict[int, tuple[int, int, int]] = {}
        """Pages of buffers, with bit 0 for writing: guest-physical and system-physical address, and when that was."""
        self.continuation: tuple[int, tuple[int, ...]] | None = None

    # Continuations ------------------------------------------------------------------------------------------------

    def preempt_check(self) -> bool:
        """Whether something more urgent waits: after `left` pieces of work. A FastABI call has nowhere to keep its
        progress and is never preempted here.
        """
        if self.abi is Abi.FAST:
            return False
        self.left -= 1
        return self.left <= 0

    def continue_(self, number: int, *args: int) -> int:
        """Ask to be called again with these arguments; the guest executes VMMCALL once more."""
        self.continuation = (number, args)
        return 0

    # Buffers ------------------------------------------------------------------------------------------------------

    def _place(self, handle: int, *, write: bool) -> int | None:
        """SPA of the byte at `handle`, as Xen finds it; None where the copy fails."""
        machine = self.machine
        page = handle & -PAGE_BYTES | write
        changes = machine.access.changes
        known = self.places.get(page)
        if known is None and self.abi is LEGACY:
            walked = self.walks.page(machine, self.vcpu, self.domain, handle, write=write)
            if walked is None:
                return None
            gpa, found = walked
        else:
            if known is None:
                gpa = handle & -PAGE_BYTES
            else:  # walked once a call
                gpa, spa, when = known
                if when == changes:
                    return spa + (handle & PAGE_MASK)
            found = page_of(machine, self.domain, gpa >> PAGE_SHIFT)
        if found is None or (write and not may_write(machine, found)):
            return None
        self.places[page] = gpa, found, changes
        return found + (handle & PAGE_MASK)

    def copy_in(self, handle: int, length_bytes: int) -> bytes | None:
        """Read a buffer of the guest; None is EFAULT. One fetch a page."""
        if length_bytes <= PAGE_BYTES - (handle & PAGE_MASK):
            spa = self._place(handle, write=False)
            return None if spa is None else fetch(self.machine, spa, length_bytes)
        if length_bytes > MAX_COPY_BYTES:
            return None
        places = [
            (self._place(start & MASK64, write=False), count) for start, count in split_pages(handle, length_bytes)
        ]
        if any(spa is None for spa, _ in places):
            return None
        return b"".join(fetch(self.machine, spa, count) for spa, count in places if spa is not None)

    def copy_out(self, handle: int, data: bytes) -> bool:
        """Write a buffer of the guest; False is EFAULT, and then nothing was written."""
        if len(data) <= PAGE_BYTES - (handle & PAGE_MASK):
            place = self._place(handle, write=True)
            if place is None:
                return False
            self.machine.memory.write(place, data, None, TAG_HYPERVISOR)
            return True
        places = [(self._place(start & MASK64, write=True), count) for start, count in split_pages(handle, len(data))]
        if any(spa is None for spa, _ in places):
            return False
        done = 0
        for spa, count in places:
            if spa is not None:
                self.machine.memory.write(spa, data[done : done + count], None, TAG_HYPERVISOR)
            done += count
        return True

    def read(self, handle: int, shape: type[Layout] | Shape) -> Any:
        """The structure at `handle` as a snapshot; None is EFAULT."""
        layout = self.layout(shape)
        data = self.copy_in(handle, layout.SIZE)
        return None if data is None else layout.from_bytes(data)

    def layout(self, shape: type[Layout] | Shape) -> type[Layout]:
        """The form of a structure for this caller's width."""
        if isinstance(shape, tuple):
            return shape.narrow if self.narrow else shape.wide
        return shape

    def read_long(self, handle: int) -> int | None:
        """An unsigned long of the caller."""
        data = self.copy_in(handle, self.long_bytes)
        return None if data is None else int.from_bytes(data, "little")

    @property
    def long_bytes(self) -> int:
        """Bytes of an unsigned long, a handle, or a frame number of the caller."""
        return 4 if self.narrow else 8

    @property
    def mask(self) -> int:
        """All ones of an unsigned long of the caller."""
        return MASK32 if self.narrow else MASK64

    # Who ----------------------------------------------------------------------------------------------------------

    def any_domain(self, domid: int) -> Domain | None:
        """The domain that `domid` names, SELF included."""
        return self.domain if domid == SELF else xen(self.machine).domains.get(domid)

    def may(self, target: Domain) -> bool:
        """The default policy for operations on `target`: oneself, or the control domain."""
        return target is self.domain or self.domain.is_control


def is_grant(domain: Domain, gfn: int) -> bool:
    """Whether a grant is mapped at `gfn`."""
    return domain.special.get(gfn) in (PageKind.GRANT_RO, PageKind.GRANT_RW)
