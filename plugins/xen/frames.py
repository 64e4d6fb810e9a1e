"""Guest frames as Xen sees them: what is behind a frame number, and access to it without any key.

Nothing here decrypts: of a private page Xen reads ciphertext, and what it writes there is garbage to the guest. Where
the RMP denies a write, it does not happen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.access import GPA_NONE, HYPERVISOR, AccessKind
from sevlab.core.memory import TAG_HYPERVISOR
from sevlab.core.units import PAGE_BYTES, PAGE_SHIFT
from sevlab.plugins.xen.state import Domain, PageKind, xen

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

WRITE, XEN = int(AccessKind.WRITE), PageKind.XEN
MAX_GFN = (1 << 48 - PAGE_SHIFT) - 1
INVALID_GFN = (1 << 64) - 1


# Bytes ------------------------------------------------------------------------------------------------------------


def fetch(machine: Machine, spa: int, length_bytes: int) -> bytes:
    """One counted read of memory that a guest can change meanwhile."""
    fetches = machine.fetches
    fetches.count += 1
    if fetches.watched:
        fetches.notice(spa, length_bytes, spa)
    return machine.memory.read(spa, length_bytes, None)


def may_write(machine: Machine, spa: int) -> bool:
    """Whether the hypervisor may write the page at `spa`: not where the RMP gives it to a guest."""
    check = machine.slots.access_check
    return check is None or check(HYPERVISOR, spa, GPA_NONE, WRITE) is None


def store(machine: Machine, spa: int, data: bytes) -> bool:
    """Write `data` within one page; False, and nothing written, where the RMP forbids it."""
    if machine.slots.access_check is not None and not may_write(machine, spa):
        return False
    machine.memory.write(spa, data, None, TAG_HYPERVISOR)
    return True


def test_bit(machine: Machine, spa: int, bit: int) -> bool:
    """Bit `bit` of the bitmap at `spa`."""
    return bool(fetch(machine, spa + (bit >> 3), 1)[0] >> (bit & 7) & 1)


def test_and_set_bit(machine: Machine, spa: int, bit: int) -> bool:
    """Set a bit; whether it was set before."""
    place, mask = spa + (bit >> 3), 1 << (bit & 7)
    byte = fetch(machine, place, 1)[0]
    if byte & mask:
        return True
    store(machine, place, bytes((byte | mask,)))
    return False


def test_and_clear_bit(machine: Machine, spa: int, bit: int) -> bool:
    """Clear a bit; whether it was set before."""
    place, mask = spa + (bit >> 3), 1 << (bit & 7)
    byte = fetch(machine, place, 1)[0]
    if not byte & mask:
        return False
    store(machine, place, bytes((byte & ~mask,)))
    return True


# Frames -----------------------------------------------------------------------------------------------------------


def frame_spa(machine: Machine, domain: Domain, gfn: int) -> int | None:
    """SPA of what is mapped at `gfn`, whatever it is."""
    if gfn > MAX_GFN:
        return None
    vcpu = machine.vcpus[domain.vcpus[0].vcpu_id]
    return machine.access.translate_gpa(vcpu, gfn << PAGE_SHIFT)


def page_of(machine: Machine, domain: Domain, gfn: int) -> int | None:
    """SPA of the domain's own page at `gfn`: its RAM, or a page of Xen's that it shares. None for all else."""
    if gfn > MAX_GFN or domain.special.get(gfn, XEN) is not XEN:
        return None
    return machine.access.translate_gpa(machine.vcpus[domain.vcpus[0].vcpu_id], gfn << PAGE_SHIFT)


def gfn_of(machine: Machine, domain: Domain, spa: int) -> int | None:
    """Where the domain has mapped Xen's page `spa`."""
    for gfn, kind in domain.special.items():
        if kind is PageKind.XEN and frame_spa(machine, domain, gfn) == spa:
            return gfn
    return None


def map_frame(
    machine: Machine, domain: Domain, gfn: int, spa: int, kind: PageKind | None, *, writable: bool = True
) -> None:
    """Map `spa` at `gfn`; `kind` None means RAM of the domain."""
    tables = machine.access.nested_tables(machine.hypervisor.vms[domain.vm_id])
    tables.map(gfn << PAGE_SHIFT, spa, PAGE_BYTES, writable=writable)
    machine.access.forget()
    if kind is not None:
        domain.special[gfn] = kind
    elif gfn in domain.special:
        del domain.special[gfn]


def unmap_frame(machine: Machine, domain: Domain, gfn: int) -> None:
    """Leave a hole at `gfn`."""
    machine.access.nested_tables(machine.hypervisor.vms[domain.vm_id]).unmap(gfn << PAGE_SHIFT, PAGE_BYTES)
    machine.access.forget()
    if gfn in domain.special:
        del domain.special[gfn]


def allocate_page(machine: Machine) -> int | None:
    """SPA of a page, zeroed where a domain had it before; None when memory is out."""
    state = xen(machine)
    if state.free_spas:
        *rest, spa = state.free_spas
        state.free_spas = tuple(rest)
        store(machine, spa, bytes(PAGE_BYTES))
        return spa
    hypervisor = machine.hypervisor
    if hypervisor.next_free_spa + PAGE_BYTES > machine.memory.size_bytes:
        return None
    return hypervisor.allocate_pages(1)


def free_page(machine: Machine, spa: int) -> None:
    """Take a page back. One that somebody still uses, or that the RMP still gives to the guest, goes to nobody else."""
    if may_write(machine, spa) and not referenced(machine, spa):
        state = xen(machine)
        state.free_spas = (*state.free_spas, spa)


def referenced(machine: Machine, spa: int) -> bool:
    """Whether a grant in use, an event array or an area of a vCPU lies in the page at `spa`."""
    for domain in xen(machine).domains.values():
        if spa in domain.event_array or any(grant.spa == spa for grant in domain.grants.active.values()):
            return True
        for vcpu in domain.vcpus:
            if spa in {
                area & -PAGE_BYTES for area in (vcpu.info_spa, vcpu.control_spa, vcpu.runstate_spa, vcpu.time_spa)
            }:
                return True
    return False


def has_room(machine: Machine) -> bool:
    """Whether nested tables for one more frame fit into memory: at most three pages of them."""
    return machine.hypervisor.next_free_spa + 3 * PAGE_BYTES <= machine.memory.size_bytes
