"""What the plugin's own steps do, and what happens before each entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sevlab.core.cpu import CONTROL_SEV_ES, FaultUnwind, leave_guest
from sevlab.core.events import AdvanceClock, CpuExit, Done, Faulted, Refused
from sevlab.core.hypercall import CodeMode, code_mode
from sevlab.core.svm import ExitCode
from sevlab.core.units import MASK64
from sevlab.plugins import io
from sevlab.plugins.xen import backends, clock, events
from sevlab.plugins.xen.dispatch import ARGUMENTS_32, ARGUMENTS_64
from sevlab.plugins.xen.numbers import ABI_FLAG, NR_VIRQS
from sevlab.plugins.xen.operations import FAST_REGISTERS
from sevlab.plugins.xen.records import BackendEvent, ConsoleInput, HypercallStep, XenstoreRequest
from sevlab.plugins.xen.settings import AltAbi, Settings
from sevlab.plugins.xen.state import Domain, RunState, domain_of, vcpu_of, xen

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

VMMCALL = b"\x0f\x01\xd9"
MAX_REPEATS = 64
"""How often one step repeats a preempted call; the guest is then left at the instruction."""
RUNNING = RunState.RUNNING


class Steps:
    """The handlers, with the machine's settings at hand."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def register(self, builder: PluginBuilder) -> None:
        """Register them."""
        builder.steps.add(HypercallStep, self.hypercall)
        builder.steps.add(ConsoleInput, backends.console_input)
        builder.steps.add(XenstoreRequest, backends.xenstore_request)
        builder.steps.add(BackendEvent, backend_event)
        builder.steps.replace(AdvanceClock, with_timers)
        builder.at_entry(prepare_entry)

    def hypercall(self, machine: Machine, step: HypercallStep) -> None:
        """Put the arguments where the ABI wants them and execute VMMCALL, again while it is preempted."""
        vcpu = machine.vcpus.get(step.vcpu)
        if vcpu is None:
            machine.emit(Refused(f"there is no vCPU {step.vcpu}"))
            return
        if vcpu.stopped or vcpu.halted:
            machine.emit(Refused(f"vCPU {step.vcpu} does not run"))
            return
        fast = bool(step.number & ABI_FLAG) and self._settings.alt_abi is AltAbi.FAST
        wide = code_mode(vcpu) is CodeMode.BITS_64
        names = FAST_REGISTERS[1:] if fast and wide else ARGUMENTS_64 if wide else ARGUMENTS_32
        vcpu.regs.rax = step.number
        for name, value in zip(names, step[2:], strict=False):
            setattr(vcpu.regs, name, value)
        for _ in range(MAX_REPEATS):
            if not execute_vmmcall(machine, vcpu):
                return


def execute_vmmcall(machine: Machine, vcpu: Vcpu) -> bool:
    """The guest executes VMMCALL where it is; True when it stays there, preempted."""
    before = vcpu.regs.rip
    exit_ = CpuExit(vcpu.vcpu_id, ExitCode.VMMCALL, 0, 0, VMMCALL, before + len(VMMCALL) & MASK64)
    try:
        leave_guest(machine, vcpu, exit_)
    except FaultUnwind as unwind:
        machine.emit(Faulted(*unwind.fault))
        return False
    if vcpu.vmcb.encryption_control & CONTROL_SEV_ES:
        return False  # a call that is preempted goes on inside the GHCB event
    return vcpu.regs.rip == before and not vcpu.stopped and not vcpu.halted


def with_timers(original: Callable[[Machine, Any], None]) -> Callable[[Machine, Any], None]:
    """Time passes, and Xen's timers fire."""

    def advance(machine: Machine, step: AdvanceClock) -> None:
        original(machine, step)
        clock.tick(machine)

    return advance


def prepare_entry(machine: Machine, vcpu: Vcpu) -> None:
    """Before VMRUN: the level of the callback's line, and the runstate."""
    domain = domain_of(machine, vcpu)
    if domain is None:
        return
    vcpus = domain.vcpus
    me = vcpus[vcpu.vcpu_id - vcpus[0].vcpu_id]
    if domain.callback_asserted:
        events.update_line(machine, domain)
    if me.run_state is not RUNNING and not me.down:
        clock.change_runstate(machine, domain, me, RUNNING)


# Backends ---------------------------------------------------------------------------------------------------------


def _domain(machine: Machine, domid: int) -> Domain | None:
    domain = xen(machine).domains.get(domid)
    if domain is None:
        machine.emit(Refused(f"there is no domain {domid}"))
    return domain


def backend_event(machine: Machine, step: BackendEvent) -> None:
    """Raise a VIRQ, the level of a GSI, or a PIRQ."""
    domain = _domain(machine, step.domid)
    if domain is None:
        return
    vcpu = vcpu_of(machine, domain, step.vcpu)
    if vcpu is None:
        machine.emit(Refused(f"domain {step.domid} has no vCPU {step.vcpu}"))
    elif step.kind == "virq" and step.number < NR_VIRQS:
        events.raise_virq(machine, domain, vcpu, step.number)
        machine.emit(Done())
    elif step.kind == "gsi" and step.number < events.ISA_IRQS:
        _raise_gsi(machine, domain, step.number)
        machine.emit(Done())
    elif step.kind == "pirq" and step.number in domain.pirq_ports:
        events.set_pending(machine, domain, domain.channels[domain.pirq_ports[step.number]])
        machine.emit(Done())
    else:
        machine.emit(
            Refused(f"no {step.kind!r:.20} {step.number}: expected a virq below 24, a gsi below 16, a bound pirq")
        )


def _raise_gsi(machine: Machine, domain: Domain, gsi: int) -> None:
    """An edge on an emulated line; where a PIRQ stands for it, its event instead."""
    for pirq, line in domain.pirqs.items():
        if line == gsi and pirq in domain.pirq_ports:
            events.set_pending(machine, domain, domain.channels[domain.pirq_ports[pirq]])
            return
    board = io.devices(machine, machine.vcpus[domain.vcpus[0].vcpu_id])
    board.set_irq(machine, gsi, level=True)
    board.set_irq(machine, gsi, level=False)
