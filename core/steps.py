"""What the kernel does with its own steps; each handler is total: whatever the fields hold, it answers with records."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sevlab.core import events as ev
from sevlab.core.asp import COMMAND_SHIFT
from sevlab.core.buffers import RaceWrite
from sevlab.core.cpu import GPR_NAMES, FaultUnwind, Vcpu, leave_guest
from sevlab.core.memory import TAG_HYPERVISOR
from sevlab.core.svm import ExitCode, Vector
from sevlab.core.units import MASK32, MASK64, PAGE_1G_BYTES, PAGE_2M_BYTES, PAGE_BYTES, is_aligned

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.machine import Machine

MAX_ACCESS_BYTES = 1 << 20
"""Longest access of one memory step: enough for every test, and no step can ask for all memory."""

VMCB_CONTROL_BYTES = 0x400
SETTABLE_REGISTERS = (*GPR_NAMES, "rip", "rflags")
SETTABLE_SYSTEM_REGISTERS = ("cpl", "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "dr6", "dr7", "xcr0", "xss")
PAGE_SIZES = (PAGE_BYTES, PAGE_2M_BYTES, PAGE_1G_BYTES)


def register(builder: PluginBuilder) -> None:
    """Register the kernel's step handlers."""
    handlers: dict[type, Callable[[Machine, Any], None]] = {
        ev.CpuExit: cpu_exit,
        ev.SetRegisters: set_registers,
        ev.MemoryRead: memory_read,
        ev.MemoryWrite: memory_write,
        ev.NptEdit: npt_edit,
        ev.VmcbWrite: vmcb_write,
        ev.HostMsr: host_msr,
        ev.HostCpuid: host_cpuid,
        ev.CacheOp: cache_op,
        ev.AspRegisterRead: asp_register_read,
        ev.AspRegisterWrite: asp_register_write,
        ev.AspCommand: asp_command,
        ev.Race: race,
        ev.AdvanceClock: advance_clock,
        ev.Schedule: schedule,
    }
    for kind, handler in handlers.items():
        builder.steps.add(kind, handler)


def _vcpu(machine: Machine, vcpu_id: int) -> Vcpu | None:
    vcpu = machine.vcpus.get(vcpu_id)
    if vcpu is None:
        machine.emit(ev.Refused(f"there is no vCPU {vcpu_id}"))
    return vcpu


def deliver_fault(machine: Machine, vcpu: Vcpu | None, fault: ev.Fault) -> None:
    """A nested page fault is an exit to the hypervisor; any other exception is the accessor's own."""
    if vcpu is not None and fault.vector == ExitCode.NPF:
        leave_guest(machine, vcpu, ev.CpuExit(vcpu.vcpu_id, ExitCode.NPF, fault.error_code, fault.address, b"", 0))
    else:
        machine.emit(ev.Faulted(*fault))


def cpu_exit(machine: Machine, step: ev.CpuExit) -> None:
    """A guest does something that may be intercepted."""
    vcpu = machine.vcpus.get(step.vcpu)
    if vcpu is None:
        machine.emit(ev.Refused(f"there is no vCPU {step.vcpu}"))
        return
    try:
        leave_guest(machine, vcpu, step)
    except FaultUnwind as unwind:
        machine.emit(ev.Faulted(*unwind.fault))


def set_registers(machine: Machine, step: ev.SetRegisters) -> None:
    """Put values into registers; an unknown name or impossible value refuses all of them."""
    vcpu = _vcpu(machine, step.vcpu)
    if vcpu is None:
        return
    for pair in step.values:
        known = isinstance(pair, tuple) and len(pair) == 2 and pair[0] in SETTABLE_REGISTERS + SETTABLE_SYSTEM_REGISTERS
        if not known:
            machine.emit(ev.Refused(f"no register {pair!r:.60}"))
            return
        if not isinstance(pair[1], int) or not 0 <= pair[1] <= MASK64:
            machine.emit(ev.Refused(f"{pair[0]} cannot hold {pair[1]!r:.60}"))
            return
    for name, value in step.values:
        setattr(vcpu.regs if name in SETTABLE_REGISTERS else vcpu.system, name, value)
    machine.emit(ev.Done())


def memory_read(machine: Machine, step: ev.MemoryRead) -> None:
    """Read as the named party does."""
    if step.length_bytes > MAX_ACCESS_BYTES:
        machine.emit(ev.Refused(f"{step.length_bytes} bytes: expected at most {MAX_ACCESS_BYTES}"))
        return
    _memory(machine, step, lambda path: machine.emit(ev.Data(path.read(step.address, step.length_bytes))))


def memory_write(machine: Machine, step: ev.MemoryWrite) -> None:
    """Write as the named party does; a fault on a later page leaves the earlier ones unwritten."""
    if len(step.data) > MAX_ACCESS_BYTES:
        machine.emit(ev.Refused(f"{len(step.data)} bytes: expected at most {MAX_ACCESS_BYTES}"))
        return

    def write(path: Any) -> None:
        path.write(step.address, step.data)
        machine.emit(ev.Done())

    _memory(machine, step, write)


def _memory(machine: Machine, step: ev.MemoryRead | ev.MemoryWrite, do: Callable[[Any], None]) -> None:
    vcpu = None
    if step.party == ev.Party.GUEST:
        vcpu = _vcpu(machine, step.vcpu)
        if vcpu is None:
            return
    path = machine.access.path(step.party, step.space, vcpu, c_bit=step.c_bit)
    if path is None:
        machine.emit(ev.Refused(f"party {step.party} has no addresses of space {step.space}"))
        return
    try:
        do(path)
    except FaultUnwind as unwind:
        deliver_fault(machine, vcpu, unwind.fault)


def npt_edit(machine: Machine, step: ev.NptEdit) -> None:
    """Change one nested mapping."""
    vm = machine.hypervisor.vms.get(step.vm)
    if vm is None:
        machine.emit(ev.Refused(f"there is no VM {step.vm}"))
        return
    limit = 1 << 48
    if step.page_bytes not in PAGE_SIZES or not (step.gpa < limit and step.spa < limit):
        machine.emit(ev.Refused("expected a page of 4 KiB, 2 MiB or 1 GiB below 2^48"))
        return
    if not (is_aligned(step.gpa, step.page_bytes) and is_aligned(step.spa, step.page_bytes)):
        machine.emit(ev.Refused(f"gpa {step.gpa:#x} or spa {step.spa:#x} is not aligned to {step.page_bytes:#x}"))
        return
    tables = machine.access.nested_tables(vm)
    if step.flags & ev.MapFlag.UNMAP:
        tables.unmap(step.gpa, step.page_bytes)
    else:
        tables.map(
            step.gpa,
            step.spa,
            step.page_bytes,
            writable=bool(step.flags & ev.MapFlag.WRITABLE),
            user=bool(step.flags & ev.MapFlag.USER),
            no_execute=bool(step.flags & ev.MapFlag.NO_EXECUTE),
            c_bit=bool(step.flags & ev.MapFlag.C_BIT),
        )
    machine.access.forget()
    machine.emit(ev.Done())


def vmcb_write(machine: Machine, step: ev.VmcbWrite) -> None:
    """Change bytes of a VMCB control area."""
    vcpu = _vcpu(machine, step.vcpu)
    if vcpu is None:
        return
    if step.offset + len(step.data) > VMCB_CONTROL_BYTES:
        machine.emit(ev.Refused(f"offset {step.offset:#x}: the control area has {VMCB_CONTROL_BYTES:#x} bytes"))
        return
    area = bytearray(vcpu.vmcb.to_bytes())
    area[step.offset : step.offset + len(step.data)] = step.data
    vcpu.vmcb.load_bytes(bytes(area))
    machine.emit(ev.Done())


def host_msr(machine: Machine, step: ev.HostMsr) -> None:
    """RDMSR or WRMSR of the host; an unknown register is #GP(0)."""
    msr = machine.tables.host_msrs.get(step.msr)
    fault = ev.Fault(Vector.GP, 0, 0)
    if step.write:
        answer = fault if msr is None or msr.write is None else msr.write(machine, None, step.msr, step.value)
        machine.emit(ev.Done() if answer is None else ev.Faulted(*answer))
        return
    value = fault if msr is None or msr.read is None else msr.read(machine, None, step.msr)
    machine.emit(ev.Value(value) if isinstance(value, int) else ev.Faulted(*value))


def host_cpuid(machine: Machine, step: ev.HostCpuid) -> None:
    """CPUID of the host."""
    machine.emit(ev.CpuidResult(*machine.cpuid(None, step.leaf & 0xFFFF_FFFF, step.subleaf & 0xFFFF_FFFF)))


def cache_op(machine: Machine, step: ev.CacheOp) -> None:
    """WBINVD, INVD or CLFLUSH; without modelled caches they are done at once."""
    if step.operation == "wbinvd":
        machine.memory.write_back_all()
    elif step.operation == "invd":
        machine.memory.drop_all()
    elif step.operation == "clflush":
        machine.memory.flush_page(step.spa)
    else:
        machine.emit(ev.Refused(f"cache operation {step.operation!r:.40}: expected wbinvd, invd or clflush"))
        return
    machine.emit(ev.Done())


def asp_register_read(machine: Machine, step: ev.AspRegisterRead) -> None:
    """The driver reads a register."""
    machine.emit(ev.Value(machine.asp.read(machine, step.offset)))


def asp_register_write(machine: Machine, step: ev.AspRegisterWrite) -> None:
    """The driver writes a register; a command word runs the command."""
    machine.asp.write(machine, step.offset, step.value)
    machine.emit(ev.Done())


def asp_command(machine: Machine, step: ev.AspCommand) -> None:
    """The driver's whole sequence for one command."""
    interface = machine.mailboxes.get(step.interface)
    if interface is None:
        machine.emit(ev.Refused(f"the ASP has no interface {step.interface!r:.40}"))
        return
    if len(step.buffer) > PAGE_BYTES:
        machine.emit(ev.Refused(f"command buffer of {len(step.buffer)} bytes: expected at most {PAGE_BYTES}"))
        return
    if not machine.asp.present:
        machine.emit(ev.Refused("the ASP is not there"))
        return
    if step.buffer:
        try:
            machine.access.hypervisor_write(step.spa, step.buffer)
        except FaultUnwind as unwind:
            machine.emit(ev.Faulted(*unwind.fault))
            return
    asp = machine.asp
    asp.write(machine, interface.address_low_register, step.spa & MASK32)
    asp.write(machine, interface.address_high_register, step.spa >> 32)
    asp.write(machine, interface.command_register, (step.command & interface.command_mask) << COMMAND_SHIFT)


def race(machine: Machine, step: ev.Race) -> None:
    """Arm a write for the next step."""
    if not step.before_fetch:
        machine.emit(ev.Refused("fetches are counted from 1"))
        return
    machine.fetches.arm(RaceWrite(step.before_fetch, step.spa, step.data, TAG_HYPERVISOR, None))
    machine.emit(ev.Done())


def advance_clock(machine: Machine, step: ev.AdvanceClock) -> None:
    """Let time pass."""
    machine.clock.advance(step.ticks)
    machine.emit(ev.Done())


def schedule(machine: Machine, _step: ev.Schedule) -> None:
    """Pick a vCPU and enter it."""
    vcpu = machine.hypervisor.schedule(machine)
    if vcpu is None:
        machine.emit(ev.Refused("no vCPU can run"))
        return
    machine.emit(ev.Scheduled(vcpu.vcpu_id))
    machine.hypervisor.enter(machine, vcpu)
