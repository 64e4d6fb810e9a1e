"""The hypervisor's driver of SNP: enable it, run commands, own pages, launch a guest.

Commands, memory, registers and RMP instructions go through `Machine.apply`, as a driver's do; nothing here changes the
firmware's state. Source: Linux drivers/crypto/ccp/sev-dev.c, arch/x86/virt/svm/sev.c, arch/x86/kvm/svm/sev.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

from sevlab.core.cpu import CONTROL_SEV, CONTROL_SEV_ES
from sevlab.core.errors import ConfigError
from sevlab.core.events import (
    AspCommand,
    AspRegisterWrite,
    AspStatus,
    CacheOp,
    Data,
    HostMsr,
    MemoryRead,
    MemoryWrite,
    NptEdit,
    Party,
    Space,
    Value,
)
from sevlab.core.state import Stateful
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES
from sevlab.plugins.sev import Command, Status, asids, sev_state
from sevlab.plugins.sev_es import Vmsa, set_up_vcpus, vm_protocol
from sevlab.plugins.sme import SYSCFG
from sevlab.plugins.snp.automata import SnpPlatformState
from sevlab.plugins.snp.command_table import SNP_COMMANDS
from sevlab.plugins.snp.hypervisor import host_guest, host_vcpu
from sevlab.plugins.snp.launch_digest import VMSA_GPA, PageType
from sevlab.plugins.snp.layout import RmpState
from sevlab.plugins.snp.records import RmpResult, RmpUpdate
from sevlab.plugins.snp.report import GuestPolicy
from sevlab.plugins.snp.states import SnpVcpu, snp_state
from sevlab.plugins.snp.vtom import TOP

if TYPE_CHECKING:
    from sevlab.core.layout import FieldValue, Layout
    from sevlab.core.machine import Machine

SYSCFG_SNP = 1 << 19 | 1 << 23 | 1 << 24 | 1 << 25
"""MFDM, MemEncryptionModEn, SNPEn, VMPLEn."""

DEFAULT_POLICY = int.from_bytes(GuestPolicy.build(must_be_one=1, smt=1), "little")

BUFFERS: dict[Command, type[Layout] | None] = {declared.command: declared.buffer for declared in SNP_COMMANDS}


class SnpDriver(Stateful):
    """The driver's own memory: a page for command buffers, one for input, one that the firmware may write."""

    command_spa: int = 0
    input_spa: int = 0
    output_spa: int = 0


def pages(machine: Machine) -> SnpDriver:
    """The driver's pages, taken at the first use; the output page is Firmware whenever SNP is initialised."""
    driver = cast("SnpDriver", machine.components["snp.driver"])
    if not driver.command_spa:
        first = machine.hypervisor.allocate_pages(4)
        driver.command_spa, driver.input_spa, driver.output_spa = first, first + PAGE_BYTES, first + 2 * PAGE_BYTES
    return driver


def run(machine: Machine, command: Command, **fields: FieldValue) -> int:
    """Run one SNP command with these fields in its buffer; its status."""
    layout = BUFFERS[command]
    buffer = b"" if layout is None else layout.build(**fields)
    step = AspCommand("sev", command, pages(machine).command_spa, buffer)
    answer = machine.apply(step).first(AspStatus)
    if answer is None:
        raise ConfigError(f"{command.name}: the machine did not run it")
    return answer.status


def need(machine: Machine, command: Command, **fields: FieldValue) -> None:
    """As `run`, for a command that must succeed. Raises `ConfigError` with the status."""
    status = run(machine, command, **fields)
    if status:
        name = Status(status).name if status in _STATUSES else f"{status:#x}"
        raise ConfigError(f"{command.name}: {name}, expected SUCCESS")


_STATUSES = frozenset(Status)


def put(machine: Machine, spa: int, data: bytes) -> None:
    """Write plaintext as the hypervisor does."""
    machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, spa, False, data))


def get(machine: Machine, spa: int, length_bytes: int) -> bytes:
    """Read as the hypervisor does."""
    data = machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, False, length_bytes)).first(Data)
    if data is None:
        raise ConfigError(f"the hypervisor cannot read {length_bytes:#x} bytes at {spa:#x}")
    return data.data


def rmp_update(machine: Machine, spa: int, **state: int) -> int:
    """RAX of an RMPUPDATE with these fields of `RmpState`."""
    result = machine.apply(RmpUpdate(spa, RmpState.build(**state))).first(RmpResult)
    if result is None:
        raise ConfigError("RMPUPDATE: SNP is not enabled")
    return result.rax


def make_firmware(machine: Machine, spa: int) -> None:
    """Give a page to the firmware. Raises `ConfigError` when RMPUPDATE refuses."""
    if rmp_update(machine, spa, assigned=1, immutable=1):
        raise ConfigError(f"page {spa:#x}: RMPUPDATE refuses to make it Firmware")


def take_back(machine: Machine, spa: int) -> None:
    """Get a page back from the firmware: SNP_PAGE_RECLAIM, then RMPUPDATE."""
    need(machine, Command.SNP_PAGE_RECLAIM, page=spa // PAGE_BYTES)
    if rmp_update(machine, spa):
        raise ConfigError(f"page {spa:#x}: RMPUPDATE refuses to take it back")


def enable(machine: Machine) -> None:
    """Set SYSCFG, run SNP_INIT_EX with a fresh RMP, flush; nothing to do when it was done before."""
    syscfg = machine.apply(HostMsr(SYSCFG, False, 0)).first(Value)
    if syscfg is not None and syscfg.value & SYSCFG_SNP != SYSCFG_SNP:
        machine.apply(HostMsr(SYSCFG, True, syscfg.value | SYSCFG_SNP))
    if snp_state(machine).platform.state is SnpPlatformState.INIT:
        return
    need(machine, Command.SNP_INIT_EX, init_rmp=1)
    flush(machine)
    make_firmware(machine, pages(machine).output_spa)


def flush(machine: Machine) -> None:
    """WBINVD on every core, then SNP_DF_FLUSH."""
    machine.apply(CacheOp("wbinvd", 0))
    need(machine, Command.SNP_DF_FLUSH)


def output(machine: Machine, command: Command, length_bytes: int, **fields: FieldValue) -> bytes:
    """Run a command that writes to the driver's output page (`page_spa`) and read the answer.

    The page is the firmware's: a host read of it shows plaintext, because nobody encrypts it.
    """
    spa = pages(machine).output_spa
    need(machine, command, page_spa=spa, **fields)
    return get(machine, spa, length_bytes)


class PageLender(Stateful):
    """What lets the driver of the legacy commands run them while SNP is initialised.

    Source: Linux drivers/crypto/ccp/sev-dev.c (rmp_mark_pages_firmware, snp_reclaim_pages).
    """

    def give(self, machine: Machine, spa: int) -> None:
        """Make the page Firmware."""
        make_firmware(machine, spa)

    def ring(self, machine: Machine, command: Command, spa: int) -> AspStatus:
        """Put the buffer's address and the command into the registers; the host cannot write to the buffer any more."""
        interface = machine.mailboxes["sev"]
        machine.apply(AspRegisterWrite(interface.address_low_register, spa & 0xFFFF_FFFF))
        machine.apply(AspRegisterWrite(interface.address_high_register, spa >> 32))
        answer = machine.apply(AspRegisterWrite(interface.command_register, command << 16)).first(AspStatus)
        assert answer is not None  # the interface exists
        return answer

    def take(self, machine: Machine, spa: int) -> None:
        """Reclaim the page, whether the firmware has used it or not."""
        take_back(machine, spa)


# Guests ---------------------------------------------------------------------------------------------------------------


class LaunchPage(NamedTuple):
    """One page to launch: its address, type, content, and the rights of VMPL1 to VMPL3."""

    gpa: int
    page_type: int
    data: bytes = bytes(PAGE_BYTES)
    permissions: tuple[int, int, int] = (0, 0, 0)


class SnpLaunched(NamedTuple):
    """A guest that runs: its context page and ASID."""

    gctx_spa: int
    asid: int


def begin_launch(machine: Machine, vm_id: int, *, policy: int = DEFAULT_POLICY, **fields: FieldValue) -> SnpLaunched:
    """Context, SNP_LAUNCH_START (`fields`: of its buffer) and SNP_ACTIVATE with the first free ASID.

    The VM's VMCBs and C-bit say from then on that it is an SNP guest.
    """
    enable(machine)
    sev = sev_state(machine)
    gctx = machine.hypervisor.allocate_pages(1)
    make_firmware(machine, gctx)
    need(machine, Command.SNP_GCTX_CREATE, page_spa=gctx)
    need(machine, Command.SNP_LAUNCH_START, gctx_spa=gctx, policy=policy, **fields)
    asid = next((n for n in range(1, sev.min_asid) if not asids.owned(sev, n)), 0)
    status = run(machine, Command.SNP_ACTIVATE, gctx_spa=gctx, asid=asid)
    if status == Status.DF_FLUSH_REQUIRED:
        flush(machine)
        need(machine, Command.SNP_ACTIVATE, gctx_spa=gctx, asid=asid)
    elif status:
        raise ConfigError(f"SNP_ACTIVATE of ASID {asid}: status {status:#x}, expected SUCCESS")
    host = host_guest(machine, vm_id)
    host.gctx_spa, host.asid = gctx, asid
    vm = machine.hypervisor.vms[vm_id]
    vm.c_bit_mask = 1 << machine.config.part.c_bit
    set_up_vcpus(machine, vm_id)
    for vcpu_id in vm.vcpu_ids:
        vm_protocol(machine, machine.vcpus[vcpu_id]).snp = True
        vmcb = machine.vcpus[vcpu_id].vmcb
        vmcb.guest_asid = asid
        vmcb.encryption_control |= CONTROL_SEV | CONTROL_SEV_ES
    return SnpLaunched(gctx, asid)


def map_page(machine: Machine, vm_id: int, gpa: int, spa: int, *, page_bytes: int = PAGE_BYTES) -> None:
    """Map a page in the VM's nested tables."""
    machine.apply(NptEdit(vm_id, gpa, spa, page_bytes, 3))


def load(machine: Machine, vm_id: int, guest: SnpLaunched, page: LaunchPage) -> int:
    """Put a page's content into memory, assign it and let SNP_LAUNCH_UPDATE take it; the status."""
    vm = machine.hypervisor.vms[vm_id]
    large = len(page.data) == PAGE_2M_BYTES
    inside = page.gpa < vm.memory_bytes
    spa = vm.memory_spa + page.gpa if inside else machine.hypervisor.allocate_pages(1)
    put(machine, spa, page.data)
    if inside and not large:
        map_page(machine, vm_id, page.gpa, spa)
    rmp_update(machine, spa, gpa=page.gpa, assigned=1, immutable=1, asid=guest.asid, page_size=int(large))
    return launch_update(machine, guest, spa, page)


def launch_update(machine: Machine, guest: SnpLaunched, spa: int, page: LaunchPage) -> int:
    """SNP_LAUNCH_UPDATE of a page that is assigned already; the status."""
    return run(
        machine,
        Command.SNP_LAUNCH_UPDATE,
        gctx_spa=guest.gctx_spa,
        page_spa=spa,
        page_size=int(len(page.data) == PAGE_2M_BYTES),
        page_type=page.page_type,
        vmpl1_perms=page.permissions[0],
        vmpl2_perms=page.permissions[1],
        vmpl3_perms=page.permissions[2],
    )


def load_vmsa(machine: Machine, vcpu_id: int, guest: SnpLaunched, vmsa: bytes) -> None:
    """Launch a VMSA page for a vCPU, at the address that KVM uses. Raises `ConfigError`.

    The processor learns of it at VMRUN; here it knows at once, so that a guest's first step needs no entry before it.
    """
    spa = machine.hypervisor.allocate_pages(2)
    spa += PAGE_BYTES if not spa % PAGE_2M_BYTES else 0  # an erratum: never 2 MiB aligned
    put(machine, spa, vmsa)
    rmp_update(machine, spa, gpa=VMSA_GPA, assigned=1, immutable=1, asid=guest.asid)
    status = launch_update(machine, guest, spa, LaunchPage(VMSA_GPA, PageType.VMSA, vmsa))
    if status:
        raise ConfigError(f"SNP_LAUNCH_UPDATE of a VMSA: status {status:#x}, expected SUCCESS")
    vcpu, features = machine.vcpus[vcpu_id], int.from_bytes(vmsa[0x3B0:0x3B8], "little")
    vcpu.vmcb.vmsa_pa = spa
    host = host_vcpu(machine, vcpu_id)
    host.vmsas = (spa, *host.vmsas[1:])
    host_guest(machine, vcpu.vm_id).sev_features = vm_protocol(machine, vcpu).sev_features = features
    top = Vmsa.from_bytes(vmsa.ljust(PAGE_BYTES, b"\0")).virtual_tom & TOP
    snp_state(machine).vcpus[vcpu_id] = SnpVcpu(sev_features=features, vmsa_spa=spa, virtual_tom=top)


def finish(machine: Machine, guest: SnpLaunched, **fields: FieldValue) -> None:
    """SNP_LAUNCH_FINISH (`fields`: of its buffer). Raises `ConfigError`."""
    need(machine, Command.SNP_LAUNCH_FINISH, gctx_spa=guest.gctx_spa, **fields)


def stop(machine: Machine, guest: SnpLaunched) -> None:
    """SNP_DECOMMISSION; the ASID is dirty until the next `flush`, and the guest's pages are still assigned."""
    need(machine, Command.SNP_DECOMMISSION, page_spa=guest.gctx_spa)
    take_back(machine, guest.gctx_spa)
