"""The check of every access against the RMP: the kernel's slot `access_check`.

The fast path compares the entry's low word, under a mask, with the word that a page of this guest at this address must
have, and the permission byte with what the access needs. Any difference goes to the slow path, which finds out which
check failed first and makes the exception.

Source: 24593, 15.36.10 and its table of checks.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sevlab.core.access import ASP, GPA_NONE, AccessKind
from sevlab.core.events import Fault
from sevlab.core.memory import Memory
from sevlab.core.paging import PfError
from sevlab.core.svm import ExitCode, NpfError, Vector
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES, PAGE_MASK, PAGE_SHIFT
from sevlab.plugins.sev import sev_state
from sevlab.plugins.sme import sme_state
from sevlab.plugins.snp.layout import (
    ASID,
    ASID_SHIFT,
    ASSIGNED,
    GPA,
    IMMUTABLE,
    PAGE_SIZE,
    PERM_EXECUTE_SUPERVISOR,
    PERM_EXECUTE_USER,
    PERM_READ,
    PERM_WRITE,
    SUBPAGE_COUNT,
    VALIDATED,
)
from sevlab.plugins.snp.rmp import BOOKKEEPING_BYTES, ENTRY_BYTES, PAIR, state_of
from sevlab.plugins.snp.states import PageState, snp_state

if TYPE_CHECKING:
    from sevlab.core.access import Actor
    from sevlab.core.machine import Machine

SNP_EN = 1 << 24
VMPL_EN = 1 << 25
"""Bits of SYSCFG. Source: 24593, 15.36.2."""

PAGE_NOT_VALIDATED = int(ExitCode.PAGE_NOT_VALIDATED)
RMP_FAULT = int(NpfError.RMP)
"""Bit 31 of a page fault's error code: the RMP refused the access. Source: 24593, 8.4.2 and 15.36.10."""

UNPACK_PAIR = PAIR.unpack_from
CHECKED = ASSIGNED | PAGE_SIZE | IMMUTABLE | GPA | ASID | VALIDATED
GUEST_WORD = ASSIGNED | VALIDATED
LARGE_FRAME = -(1 << 9)

_WRITE, _FETCH, _TABLE, _PRIVATE, _LARGE, _USER = (
    int(kind)
    for kind in (
        AccessKind.WRITE,
        AccessKind.FETCH,
        AccessKind.TABLE,
        AccessKind.PRIVATE,
        AccessKind.LARGE,
        AccessKind.USER,
    )
)
_SMALL_PRIVATE = _PRIVATE | _LARGE


def needed_permissions(kind: int) -> int:
    """The permissions that an access of `kind` needs; a write needs reading too. Source: 24593, 15.36.7."""
    if kind & _FETCH:
        return PERM_EXECUTE_USER if kind & _USER and not kind & _TABLE else PERM_EXECUTE_SUPERVISOR
    return PERM_READ | PERM_WRITE if kind & _WRITE else PERM_READ


NEEDS = tuple(needed_permissions(kind) for kind in range(1 << len(AccessKind)))
_owned_by = {asid: asid << ASID_SHIFT | GUEST_WORD for asid in range((ASID >> ASID_SHIFT) + 1)}.get
"""By ASID, what a validated 4 KiB page of this guest has under `CHECKED` besides its GPA."""
_NEEDS_AT = tuple(tuple(need << 8 * vmpl for need in NEEDS) for vmpl in range(4))
"""By VMPL and kind, in place in an entry's second word."""


def nested_fault(kind: int, gpa: int, *, reason: int = 0) -> Fault:
    """The nested page fault of a failed check: EXITINFO1 and EXITINFO2.

    The nested translation itself succeeded, so P is set. `reason`: SIZEM, VMPL or SSS. Source: 24593, 15.36.10.
    """
    code = int(NpfError.P | NpfError.U | NpfError.RMP) | reason
    code |= int(NpfError.TABLE_WALK if kind & _TABLE else NpfError.FINAL)
    code |= int(NpfError.W) if kind & _WRITE else 0
    code |= int(NpfError.ID) if kind & _FETCH else 0
    code |= int(NpfError.ENC) if kind & _PRIVATE else 0
    return Fault(ExitCode.NPF, code, gpa)


def not_validated(address: int) -> Fault:
    """#VC of an access to a page that the guest owns but has not validated. Source: 24593, 15.36.10."""
    return Fault(Vector.VC, PAGE_NOT_VALIDATED, address)


class RmpCheck:
    """The slot's function; `attach` gives it the machine."""

    __slots__ = ("_machine", "_memory", "_pages", "_sme", "_snp", "_vcpus")

    def __init__(self) -> None:
        self._machine: Any = None
        self._sme: Any = SimpleNamespace(syscfg=0)  # before there is a machine nothing is checked
        self._snp: Any = None
        self._memory: Any = None
        self._pages: Any = {}
        self._vcpus: Any = {}

    def attach(self, machine: Machine) -> None:
        """Remember the machine that is being made."""
        self._machine = machine
        self._sme = sme_state(machine)
        self._snp = snp_state(machine)
        self._vcpus = self._snp.vcpus
        self._memory = machine.memory
        if type(machine.memory) is Memory:  # modelled caches stand before the pages
            self._pages = machine.memory.pages

    def check(self, actor: Actor, spa: int, gpa: int, kind: int) -> Fault | None:
        """None, or the exception that the access ends in.

        `actor` is a vCPU when `gpa` is not `GPA_NONE`. A private access by a mapping of 4 KiB, the usual one, passes
        here in one look at the entry; whatever is not exactly so goes to the whole rule.
        Source: 24593, 15.36.10.
        """
        if not self._sme.syscfg & SNP_EN:
            return None
        if kind & _SMALL_PRIVATE == _PRIVATE and not gpa >> ASID_SHIFT:
            state = self._snp
            address = (spa >> PAGE_SHIFT) * ENTRY_BYTES + state.rmp_base + BOOKKEEPING_BYTES
            page = self._pages.get(address >> PAGE_SHIFT)
            if page is not None and page.key is None:
                vcpu: Any = actor
                low, high = UNPACK_PAIR(page.data, address & PAGE_MASK)
                need = _NEEDS_AT[vcpu.vmpl][kind]
                if (
                    low & CHECKED ^ gpa & GPA == _owned_by(vcpu.vmcb.guest_asid)
                    and high & need == need
                    and address < state.rmp_end
                    and vcpu.vcpu_id in self._vcpus
                ):
                    return None
        return self._whole(actor, spa, gpa, kind)

    def _whole(self, actor: Actor, spa: int, gpa: int, kind: int) -> Fault | None:
        """The rule for every access; `check` without its short way."""
        state = self._snp
        if gpa == GPA_NONE:
            if not kind & _WRITE:
                return None
            return self._asp(spa) if actor is ASP else self._host(state, spa)
        vcpu: Any = actor
        if vcpu.vcpu_id not in state.vcpus:
            return self._hypervisor_owned(state, spa, gpa, kind) if kind & (_WRITE | _TABLE) else None
        if not kind & (_PRIVATE | _FETCH | _TABLE):
            return self._hypervisor_owned(state, spa, gpa, kind) if kind & _WRITE else None
        if kind & _LARGE:
            frame, expected = spa >> PAGE_SHIFT & LARGE_FRAME, gpa & -PAGE_2M_BYTES | PAGE_SIZE
        else:
            frame, expected = spa >> PAGE_SHIFT, gpa & -PAGE_BYTES
        owned = _owned_by(vcpu.vmcb.guest_asid)
        if owned is None or gpa >> ASID_SHIFT:  # no entry can hold these
            return nested_fault(kind | _PRIVATE, gpa)
        words = self._words(state, frame * ENTRY_BYTES + state.rmp_base + BOOKKEEPING_BYTES)
        return _explain(words, expected | owned, vcpu.vmpl, gpa, kind | _PRIVATE)

    def _words(self, state: Any, address: int) -> tuple[int, int] | None:
        """The entry at `address`, by the slow and safe way; None: not covered."""
        if not state.rmp_base or address >= state.rmp_end:
            return None
        low, high = PAIR.unpack(self._memory.read(address, ENTRY_BYTES, None))
        return low, high

    def _host(self, state: Any, spa: int) -> Fault | None:
        """A write of the host or of a device: #PF unless the page is the hypervisor's.

        A device's write is aborted by the IOMMU; it is reported with the error code that the host's would have.
        UNVERIFIED. Source: 24593, 15.36.10.
        """
        words = self._words(state, (spa >> PAGE_SHIFT) * ENTRY_BYTES + state.rmp_base + BOOKKEEPING_BYTES)
        if words is None or not words[0] & ASSIGNED:
            return None
        return Fault(Vector.PF, int(PfError.P | PfError.W) | RMP_FAULT, spa)

    def _asp(self, spa: int) -> Fault | None:
        """What a command asks before the firmware writes to a page of the host's: it must be Firmware, or Default.

        The fault is only a no: the command answers INVALID_PAGE_STATE. Source: AMD-ASPFW sev_uapp/src/sev_rmp.c.
        """
        if not sev_state(self._machine).snp_initialised:
            return None
        if state_of(self._machine, spa) in (PageState.FIRMWARE, PageState.DEFAULT):
            return None
        return Fault(Vector.PF, int(PfError.P | PfError.W) | RMP_FAULT, spa)

    def _hypervisor_owned(self, state: Any, spa: int, gpa: int, kind: int) -> Fault | None:
        """The check Hypervisor-Owned of a guest's shared access; a large mapping needs all of its 2 MiB.

        Source: 24593, 15.36.10.
        """
        frame, taken = spa >> PAGE_SHIFT, ASSIGNED
        if kind & _LARGE:
            frame, taken = frame & LARGE_FRAME, ASSIGNED | SUBPAGE_COUNT
        words = self._words(state, frame * ENTRY_BYTES + state.rmp_base + BOOKKEEPING_BYTES)
        if words is None or not words[0] & taken:
            return None
        return nested_fault(kind, gpa)


def _explain(words: tuple[int, int] | None, expected: int, vmpl: int, gpa: int, kind: int) -> Fault | None:
    """Which check of a private access fails first, in the order of the document."""
    if words is None:
        return nested_fault(kind, gpa)  # RMP-Covered
    low, high = words
    owned = CHECKED & ~VALIDATED  # Guest-Owned, Reverse-Map, Mutable, Page-Size: one exception for all
    if (low ^ expected) & owned:
        return nested_fault(kind, gpa)
    if not low & VALIDATED:
        return not_validated(gpa)
    need = NEEDS[kind]
    if high >> 8 * vmpl & need != need:
        return nested_fault(kind, gpa, reason=int(NpfError.VMPL))
    return None
