"""The reference hypervisor's view of SNP guests: their context pages, which page is whose, and firmware commands.

What happens inside the answer to a guest: unlike `driver`, which is a host program of its own, nothing here is a step.
Source: Linux arch/x86/kvm/svm/sev.c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from sevlab.core.asp import run_command
from sevlab.core.cpu import FaultUnwind
from sevlab.core.state import StateDict, Stateful, new
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES
from sevlab.plugins.sev import Command
from sevlab.plugins.snp.layout import ASID_SHIFT, ASSIGNED, IMMUTABLE, PAGE_SIZE
from sevlab.plugins.snp.rmp import PAGES_PER_2M, owning_entry, region_of
from sevlab.plugins.snp.rmp_host import NewState, RmpCode, psmash, snp_enabled, update, update_pages

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.layout import FieldValue
    from sevlab.core.machine import Machine

VMPLS = 4
NO_PAGE = 0
NO_DOORBELL = -1


class HostVcpu(Stateful):
    """What the hypervisor keeps for one vCPU of an SNP guest."""

    vmsas: tuple[int, ...] = (NO_PAGE,) * VMPLS
    """SPA of the save area of each VMPL."""
    vmpl: int = 0
    """The VMPL whose save area runs."""
    registered: tuple[int, ...] = (-1,) * VMPLS
    """GHCB that each VMPL has registered."""
    on_init: int = NO_PAGE
    """A save area that waits for the next INIT and start-up IPI."""
    doorbell_gpa: int = NO_DOORBELL
    irr: int = 0
    """Interrupts that wait for room in the doorbell page, a bit each."""
    needs_eoi: int = 0
    """Which of them an interrupt controller keeps in service until their EOI."""
    nmi: bool = False


class HostGuest(Stateful):
    """What the hypervisor keeps for one SNP guest."""

    gctx_spa: int = 0
    asid: int = 0
    sev_features: int = 1


class SnpHypervisor(Stateful):
    """The reference hypervisor's SNP side."""

    psc_batch: int = 0
    """Entries of a page state change in one exit; 0: all."""
    certificates: bytes = b""
    """The blob for extended guest requests, as a file of the host's gives it."""
    guests: StateDict[int, HostGuest] = new(StateDict)
    vcpus: StateDict[int, HostVcpu] = new(StateDict)


def snp_hypervisor(machine: Machine) -> SnpHypervisor:
    """The reference hypervisor's SNP side of `machine`."""
    return cast("SnpHypervisor", machine.components["snp.hypervisor"])


def host_guest(machine: Machine, vm_id: int) -> HostGuest:
    """What the hypervisor keeps for VM `vm_id`."""
    guests = snp_hypervisor(machine).guests
    found = guests.get(vm_id)
    if found is None:
        found = guests[vm_id] = HostGuest()
    return found


def host_vcpu(machine: Machine, vcpu_id: int) -> HostVcpu:
    """What the hypervisor keeps for vCPU `vcpu_id`."""
    vcpus = snp_hypervisor(machine).vcpus
    found = vcpus.get(vcpu_id)
    if found is None:
        found = vcpus[vcpu_id] = HostVcpu()
    return found


def vcpu_by_apic_id(machine: Machine, vm_id: int, apic_id: int) -> Vcpu | None:
    """The vCPU with this APIC id: its number in the VM; None: there is none."""
    vcpu_ids = machine.hypervisor.vms[vm_id].vcpu_ids
    return machine.vcpus[vcpu_ids[apic_id]] if apic_id < len(vcpu_ids) else None


# Pages ----------------------------------------------------------------------------------------------------------------


def page_spa(machine: Machine, vm_id: int, gpa: int, length_bytes: int) -> int | None:
    """Where the VM's memory at `gpa` lies; None: it has none there."""
    vm = machine.hypervisor.vms[vm_id]
    return vm.memory_spa + gpa if gpa + length_bytes <= vm.memory_bytes else None


def make_private(machine: Machine, vm_id: int, gpa: int, *, large: bool) -> bool:
    """Give the guest the page as private memory, not validated; a page that it has already stays as it is.

    Source: Linux arch/x86/kvm/svm/sev.c (sev_gmem_prepare).
    """
    length_bytes = PAGE_2M_BYTES if large else PAGE_BYTES
    spa = page_spa(machine, vm_id, gpa, length_bytes)
    if spa is None or not snp_enabled(machine):
        return False
    asid = host_guest(machine, vm_id).asid
    found = owning_entry(machine, spa)
    if found is not None and found[1].asid == asid and found[1].gpa + spa - found[0] == gpa and not large:
        return True
    low = ASSIGNED | gpa | asid << ASID_SHIFT | (PAGE_SIZE if large else 0)
    code = update(machine, spa, NewState(low, length_bytes))
    if large and code == RmpCode.FAIL_OVERLAP:
        pages = range(0, PAGE_2M_BYTES, PAGE_BYTES)
        return all(make_private(machine, vm_id, gpa + offset, large=False) for offset in pages)
    if code:
        return False
    _map(machine, vm_id, gpa, spa, length_bytes)
    return True


def make_shared(machine: Machine, vm_id: int, gpa: int, *, large: bool) -> bool:
    """Take the page from the guest and let both sides use it; a part of a 2 MiB page is split off first."""
    length_bytes = PAGE_2M_BYTES if large else PAGE_BYTES
    spa = page_spa(machine, vm_id, gpa, length_bytes)
    if spa is None or not snp_enabled(machine):
        return False
    found = owning_entry(machine, spa)
    if found is None:
        return False
    if found[1].huge and not large:
        if psmash(machine, found[0]):
            return False
        for number in range(PAGES_PER_2M):
            part = number * PAGE_BYTES
            _map(machine, vm_id, gpa - (spa - found[0]) + part, found[0] + part, PAGE_BYTES)
    code = update(machine, spa, NewState(0, length_bytes if found[1].huge else PAGE_BYTES))
    if large and not found[1].huge and not code:
        pages = range(PAGE_BYTES, PAGE_2M_BYTES, PAGE_BYTES)
        return all(make_shared(machine, vm_id, gpa + offset, large=False) for offset in pages)
    if code:
        return False
    if not large or found[1].huge:
        _map(machine, vm_id, gpa, spa, length_bytes)
    return True


def change_pages_at_once(machine: Machine, vm_id: int, gpas: Sequence[int], *, private: bool) -> bool:
    """Make different pages of 4 KiB private or shared at once; False: nothing was done, do each by itself."""
    vm = machine.hypervisor.vms[vm_id]
    if max(gpas) + PAGE_BYTES > vm.memory_bytes or not snp_enabled(machine):
        return False
    spas = [vm.memory_spa + gpa for gpa in gpas]
    owned = ASSIGNED | host_guest(machine, vm_id).asid << ASID_SHIFT
    if not update_pages(machine, spas, [owned | gpa if private else 0 for gpa in gpas]):
        return False
    for gpa, spa in zip(gpas, spas, strict=True):
        _map(machine, vm_id, gpa, spa, PAGE_BYTES)
    return True


def _map(machine: Machine, vm_id: int, gpa: int, spa: int, length_bytes: int) -> None:
    """Map the page in its own size, unless it is. Source: Linux arch/x86/kvm/mmu (sizes follow the RMP)."""
    vcpu = machine.vcpus[machine.hypervisor.vms[vm_id].vcpu_ids[0]]
    try:
        now = machine.access.nested(vcpu, gpa, 0, 0)
        if now.spa == spa and now.page_bytes == length_bytes and now.writable:
            return
    except FaultUnwind:
        pass  # nothing is mapped there
    machine.access.nested_tables(machine.hypervisor.vms[vm_id]).map(gpa, spa, length_bytes)
    machine.access.forget()


def handle_rmp_fault(machine: Machine, vm_id: int, gpa: int, *, private: bool) -> bool:
    """What KVM and its VMM do at an RMP fault of a guest; False: nothing to mend.

    An access whose C-bit does not agree with the page's state is taken as a wish to change that. Else mapping and RMP
    are brought to the same size: a 2 MiB page that is needed in 4 KiB is PSMASHed, a larger mapping is replaced.
    Source: Linux arch/x86/kvm/svm/sev.c (sev_handle_rmp_fault) and mmu/mmu.c (memory fault exits).
    """
    gpa &= -PAGE_BYTES
    spa = page_spa(machine, vm_id, gpa, PAGE_BYTES)
    found = None if spa is None else owning_entry(machine, spa)
    if spa is None or found is None:
        return False
    own = found[1].asid == host_guest(machine, vm_id).asid
    if not own:
        return private and make_private(machine, vm_id, gpa, large=False)
    if not private:
        return make_shared(machine, vm_id, gpa, large=False)
    if found[1].huge:
        if psmash(machine, found[0]):
            return False
        first = gpa - (spa - region_of(spa))
        for number in range(PAGES_PER_2M):
            _map(machine, vm_id, first + number * PAGE_BYTES, found[0] + number * PAGE_BYTES, PAGE_BYTES)
        return True
    if found[1].low & IMMUTABLE or found[1].gpa != gpa:
        return False
    _map(machine, vm_id, gpa, spa, PAGE_BYTES)
    return True


# The firmware ---------------------------------------------------------------------------------------------------------


def firmware(machine: Machine, command: Command, layout: Any, **fields: FieldValue) -> int:
    """Run an SNP command while a guest waits for its answer; its status."""
    from sevlab.plugins.snp.driver import pages

    spa = pages(machine).command_spa
    interface = machine.mailboxes["sev"]
    machine.access.hypervisor_write(spa, layout.build(**fields))
    run_command(machine, interface, int(command), spa, interrupt=False)
    return machine.asp.mailboxes["sev"].command_response & 0xFFFF


def read_guest(machine: Machine, vcpu: Vcpu, gpa: int, length_bytes: int) -> bytes | None:
    """Shared guest memory, one counted fetch; None: it is not mapped."""
    window = machine.access.shared_window(vcpu, gpa, length_bytes)
    return None if window is None else window.read(0, length_bytes)


def write_guest(machine: Machine, vcpu: Vcpu, gpa: int, data: bytes) -> bool:
    """Write shared guest memory as the host does; False: it is not mapped, or not shared."""
    window = machine.access.shared_window(vcpu, gpa, len(data))
    if window is None:
        return False
    try:
        machine.access.hypervisor_write(window.spa, data)
    except FaultUnwind:
        return False
    return True
