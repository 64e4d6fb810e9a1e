"""The step `GuestExit`: put the guest where the log saw it, bring it what the log says came, and let it exit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cpu import GPR_NAMES, FaultUnwind, leave_guest
from sevlab.core.events import CpuExit, Faulted, GuestExit, Refused
from sevlab.core.svm import ALWAYS_EXITS
from sevlab.plugins.captured.lines import arrive
from sevlab.plugins.captured.records import Decoded
from sevlab.plugins.captured.state import captured
from sevlab.plugins.io import Insn, decode, devices

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

EVERYTHING = (1 << 0xC0) - 1
"""Every intercept bit: what the log shows was intercepted."""

RFLAGS_IF, RFLAGS_FIXED = 1 << 9, 1 << 1
CODE_ATTRIBUTES = {16: 0x9B, 32: 0x49B, 64: 0x29B, 0: 0x29B}
"""CS attributes in the VMCB's format by the width of the code; unknown counts as 64-bit."""


def register(builder: PluginBuilder) -> None:
    """Register the step."""
    builder.steps.add(GuestExit, guest_exit)


def guest_exit(machine: Machine, step: GuestExit) -> None:
    """Serve one exit of a log."""
    vcpu = machine.vcpus.get(step.vcpu)
    if vcpu is None:
        machine.emit(Refused(f"there is no vCPU {step.vcpu}"))
        return
    log = captured(machine)
    log.step, log.answered = step, 0
    if not _runs_again(machine, vcpu, step):
        return
    arrive(machine, vcpu, step)
    if step.insn:
        insn = decode(step.insn, step.mode or 64, step.rip)
        if isinstance(insn, Insn):
            reads = any("read" in operand.access for operand in insn.memory)
            writes = any("write" in operand.access for operand in insn.memory)
            machine.emit(Decoded(insn.length, reads, writes))
        else:
            machine.emit(Decoded(0, False, False))
    exit_ = CpuExit(step.vcpu, step.exit_code, step.exit_info_1, step.exit_info_2, step.insn, 0)
    try:
        leave_guest(machine, vcpu, exit_)
    except FaultUnwind as unwind:
        machine.emit(Faulted(*unwind.fault))
    log.requested[step.vcpu] = devices(machine, vcpu).lapics[step.vcpu].irr


def _runs_again(machine: Machine, vcpu: Vcpu, step: GuestExit) -> bool:
    """The guest runs at the place of the log, whatever the model thought of it before; False for impossible state."""
    if vcpu.stopped:
        vm = machine.vm_of(vcpu)
        vm.stopped = ""
        for other in vm.vcpu_ids:
            machine.vcpus[other].stopped = False
    vcpu.halted = False
    if step.mode not in CODE_ATTRIBUTES or not step.exit_code >= 0:
        machine.emit(Refused(f"code of {step.mode} bits: expected 16, 32, 64 or 0"))
        return False
    regs, vmcb = vcpu.regs, vcpu.vmcb
    for name, value in step.registers:
        if name not in GPR_NAMES or not isinstance(value, int):
            machine.emit(Refused(f"no register {name!r:.40}"))
            return False
        setattr(regs, name, value)
    if step.stored and step.exit_code < ALWAYS_EXITS:
        regs.rax, regs.rdx = step.stored[0], step.stored[0] >> 32
    regs.rip = step.rip
    regs.rflags = RFLAGS_FIXED | (RFLAGS_IF if step.interruptible else 0)
    code = (0, CODE_ATTRIBUTES[step.mode], 0xFFFF_FFFF, step.cs_base)
    if vcpu.system.cs != code:
        vcpu.system.cs = code
    vmcb.intercepts = EVERYTHING
    vmcb.exit_int_info = step.event
    vmcb.event_inj = 0
    return True
