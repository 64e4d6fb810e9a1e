"""Start-up of application processors: AP reset hold, and what a hypervisor sets up for an encrypted guest.

Source: Linux arch/x86/kvm/svm/sev.c (sev_vcpu_deliver_sipi_vector, sev_es_init_vmcb, sev_es_vcpu_reset).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.svm import ExitCode
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins.sev_es.declare import Reply
from sevlab.plugins.sev_es.ghcb import NaeCode
from sevlab.plugins.sev_es.hardware import encrypted
from sevlab.plugins.sev_es.hypervisor import ghcb_window, write_reply
from sevlab.plugins.sev_es.msr_layout import MsrInfo
from sevlab.plugins.sev_es.msr_requests import sev_information
from sevlab.plugins.sev_es.records import MsrReply
from sevlab.plugins.sev_es.states import DEBUG_SWAP, Hold, sev_es_state, vcpu_protocol, vm_protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

MMIO_LIMIT_BYTES = 1 << 20
"""Of a larger window, what is marked at once."""
WOKEN = 1
"""SW_EXITINFO2, or the data of the MSR, after a start-up IPI: anything but zero."""

INTERCEPTS = (
    ExitCode.INTR,
    ExitCode.NMI,
    ExitCode.SMI,
    ExitCode.INIT,
    ExitCode.RDPMC,
    ExitCode.CPUID,
    ExitCode.INVD,
    ExitCode.INVLPGA,
    ExitCode.HLT,
    ExitCode.IOIO,
    ExitCode.MSR,
    ExitCode.TASK_SWITCH,
    ExitCode.SHUTDOWN,
    ExitCode.VMRUN,
    ExitCode.VMMCALL,
    ExitCode.VMLOAD,
    ExitCode.VMSAVE,
    ExitCode.STGI,
    ExitCode.CLGI,
    ExitCode.SKINIT,
    ExitCode.RDPRU,
    ExitCode.WBINVD,
    ExitCode.MONITOR,
    ExitCode.MWAIT,
    ExitCode.EXCEPTION_0 + 18,
    ExitCode.DR7_READ,
    ExitCode.DR7_WRITE,
    ExitCode.EFER_WRITE_TRAP,
    ExitCode.CR0_WRITE_TRAP,
    ExitCode.CR0_WRITE_TRAP + 4,
    ExitCode.CR0_WRITE_TRAP + 8,
)
DR7_ACCESSES = (ExitCode.DR7_READ, ExitCode.DR7_WRITE)
"""What KVM intercepts of a SEV-ES guest, these two only without DebugSwap; XSETBV, #UD, #GP and the control registers
are left alone.

Source: Linux arch/x86/kvm/svm/svm.c (init_vmcb) and sev.c (sev_es_init_vmcb).
"""


def set_up_vcpus(machine: Machine, vm_id: int) -> None:
    """Give every vCPU of an encrypted VM its intercepts and the GHCB MSR of a reset, and mark the devices' pages.

    Source: Linux arch/x86/kvm/svm/sev.c (sev_es_vcpu_reset: the SEV information is there before anyone asks).
    """
    vm = machine.hypervisor.vms[vm_id]
    tables = machine.access.nested_tables(vm)
    for window in machine.tables.mmio:
        first = window.gpa & -PAGE_BYTES
        for gpa in range(first, min(window.gpa + window.length_bytes, first + MMIO_LIMIT_BYTES), PAGE_BYTES):
            tables.mark_mmio(gpa)
    machine.access.forget()
    swapped = vm_protocol(machine, machine.vcpus[vm.vcpu_ids[0]]).sev_features & DEBUG_SWAP
    for vcpu_id in vm.vcpu_ids:
        vcpu = machine.vcpus[vcpu_id]
        vcpu.vmcb.intercept(*(code for code in INTERCEPTS if not swapped or code not in DR7_ACCESSES))
        vcpu.vmcb.ghcb_gpa = sev_information(machine)


class StartUp:
    """The slot `start_vcpu`: an encrypted AP starts with its launch state, later from its reset hold.

    `woken` is told when a hold is over: the guest's code goes on.
    """

    __slots__ = ("_woken",)

    def __init__(self, woken: Callable[[Machine, Vcpu], None] | None) -> None:
        self._woken = woken

    def __call__(self, machine: Machine, vcpu: Vcpu, vector: int) -> bool:
        """A start-up IPI arrives; False for a guest whose registers the hypervisor can set.

        The vector means nothing here: the AP takes its start address from the jump table. A start-up IPI to a vCPU that
        runs is lost. Source: Linux arch/x86/kvm/svm/sev.c (sev_vcpu_deliver_sipi_vector).
        """
        if not encrypted(vcpu):
            return False
        state = vcpu_protocol(machine, vcpu)
        hold, state.hold = state.hold, Hold.NONE
        if hold == Hold.NONE and state.started:
            return True
        state.started = True
        vcpu.halted = False
        if hold == Hold.NONE:
            return True
        answer(machine, vcpu, hold)
        if self._woken is not None:
            self._woken(machine, vcpu)
        return True


def answer(machine: Machine, vcpu: Vcpu, hold: int) -> None:
    """Tell a vCPU in reset hold that its start-up IPI came. Source: 56421, 2.3 and 4.1."""
    if hold == Hold.MSR:
        request = vcpu.vmcb.ghcb_gpa
        vcpu.vmcb.ghcb_gpa = WOKEN << 12 | MsrInfo.AP_RESET_HOLD_RESPONSE
        machine.emit(MsrReply(vcpu.vcpu_id, request, vcpu.vmcb.ghcb_gpa))
        return
    window = ghcb_window(machine, vcpu)
    if window is not None:
        write_reply(machine, vcpu, window, NaeCode.AP_RESET_HOLD, Reply(info_2=WOKEN), b"")


def make_states(machine: Machine) -> None:
    """Make the state of every VM and vCPU that the machine starts with."""
    for vcpu in machine.vcpus.values():
        vm_protocol(machine, vcpu)
        vcpu_protocol(machine, vcpu)


def register(builder: PluginBuilder, woken: Callable[[Machine, Vcpu], None] | None) -> None:
    """Take the slot, and take over the options that replies depend on."""
    options = builder.options

    def give_features(machine: Machine) -> None:
        for vm in machine.hypervisor.vms.values():
            vm_protocol(machine, machine.vcpus[vm.vcpu_ids[0]]).sev_features = int(options["vmsa_features"])

    def offer(machine: Machine) -> None:
        state = sev_es_state(machine)
        state.protocol_min, state.protocol_max = int(options["protocol_min"]), int(options["protocol_max"])
        state.features = int(options["features"])
        state.warns = bool(options["order"])

    builder.at_boot(offer)
    builder.at_boot(make_states)
    builder.at_boot(give_features)
    builder.slot("start_vcpu", StartUp(woken))
