"""Reports of an engine, one by one: the hypervisor's if the VMCB says so, else what the processor does by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cpu import CR0_PE, GPR_NAMES, FaultUnwind, end_shadow
from sevlab.core.events import Fault
from sevlab.core.paging import EFER_LMA, PfError
from sevlab.core.svm import EventType, ExitCode, Vector, event
from sevlab.core.units import MASK32, MASK64, PAGE_BYTES, PAGE_MASK
from sevlab.plugins import io
from sevlab.plugins.engines import registers

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.cpu import Vcpu
    from sevlab.plugins.engines.execution import Execution

MSR_GHCB = 0xC001_0130
CR_MOV = 1 << 63
"""EXITINFO1 of a MOV to or from a control register; 3:0 the general register. Source: 24593, 15.8.1."""
CS_LONG, SEG_BIG = 1 << 9, 1 << 10
RFLAGS_IOPL, RFLAGS_VM = 3 << 12, 1 << 17
TSS_IO_MAP = 102
REX = range(0x40, 0x50)


def is_long(vcpu: Vcpu) -> bool:
    """64-bit mode."""
    return bool(vcpu.system.efer & EFER_LMA and vcpu.system.cs[1] & CS_LONG)


def code_bits(vcpu: Vcpu) -> int:
    """16, 32 or 64."""
    return 64 if is_long(vcpu) else 32 if vcpu.system.cs[1] & SEG_BIG else 16


def decoded(run: Execution) -> io.Insn:
    """The instruction at RIP. Raises `FaultUnwind` with #UD when there is none."""
    insn = io.decode(run.fetch(), code_bits(run.vcpu), run.vcpu.regs.rip)
    if not isinstance(insn, io.Insn):
        raise FaultUnwind(Fault(Vector.UD, 0, 0))
    return insn


def done(run: Execution, length: int) -> None:
    """The instruction of `length` bytes is executed."""
    regs = run.vcpu.regs
    regs.rip = regs.rip + length & MASK64
    assert run.engine is not None  # in whose place
    run.engine.charge(length)
    end_shadow(run.vcpu)


def handle(run: Execution, code: int, info: int) -> None:
    """One report."""
    handler = HANDLERS.get(code)
    if handler is not None:
        handler(run, code, info)
    elif ExitCode.EXCEPTION_0 <= code < ExitCode.EXCEPTION_0 + 32:
        run.exception(code - ExitCode.EXCEPTION_0, info)
    elif run.is_intercepted(code, info):
        run.leave(code, 0, 0, decoded(run).length)
    else:
        done(run, decoded(run).length)


def cpuid(run: Execution, code: int, info: int) -> None:
    """CPUID: two bytes, unless somebody puts prefixes before it."""
    head = run.fetch(2)
    length = 2 if head == b"\x0f\xa2" else decoded(run).length
    if run.is_intercepted(code):
        run.leave(code, 0, 0, length)
        return
    regs = run.vcpu.regs
    regs.rax, regs.rbx, regs.rcx, regs.rdx = run.machine.cpuid(None, regs.rax & MASK32, regs.rcx & MASK32)
    done(run, length)


def msr(run: Execution, code: int, info: int) -> None:
    """RDMSR and WRMSR; `info` bit 0: write. The GHCB MSR of an encrypted guest never exits. Source: 24593, 15.35.6."""
    vcpu, regs = run.vcpu, run.vcpu.regs
    write = info & 1
    length = 2 if run.fetch(1) == b"\x0f" else decoded(run).length
    number = regs.rcx & MASK32
    if vcpu.system.cpl:
        raise registers.refuse()
    if number == MSR_GHCB and run.encrypted_state:
        if write:
            vcpu.vmcb.ghcb_gpa = (regs.rdx & MASK32) << 32 | regs.rax & MASK32
        else:
            regs.rax, regs.rdx = vcpu.vmcb.ghcb_gpa & MASK32, vcpu.vmcb.ghcb_gpa >> 32
        done(run, length)
        return
    if run.is_intercepted(code, write):
        run.leave(code, write, 0, length)
        return
    handlers = run.machine.tables.guest_msrs.get(number)
    if handlers is None:
        raise registers.refuse()
    if write:
        value = (regs.rdx & MASK32) << 32 | regs.rax & MASK32
        before = vcpu.system.efer
        fault = registers.refuse().fault if handlers.write is None else handlers.write(run.machine, vcpu, number, value)
        if fault is not None:
            raise FaultUnwind(fault)
        if vcpu.system.efer != before:
            run.mmu.flush()
            if run.is_intercepted(ExitCode.EFER_WRITE_TRAP):
                done(run, length)
                run.leave(ExitCode.EFER_WRITE_TRAP, vcpu.system.efer & ~0x1000, 0, 0)
                return
    else:
        found = registers.refuse().fault if handlers.read is None else handlers.read(run.machine, vcpu, number)
        if not isinstance(found, int):
            raise FaultUnwind(found)
        regs.rax, regs.rdx = found & MASK32, found >> 32
    done(run, length)


def port(run: Execution, code: int, info: int) -> None:
    """IN, OUT, INS, OUTS: the check of IOPL and of the TSS's bitmap, then the exit with its whole word.

    Source: spec 24593, 12.2.5 and 15.10.2.
    """
    vcpu = run.vcpu
    insn = decoded(run)
    if insn.io is None:
        raise FaultUnwind(Fault(Vector.UD, 0, 0))
    word = insn.io.exit_info_1(vcpu.regs.rdx)
    _check_port(run, word >> 16 & 0xFFFF, insn.io.size)
    if run.is_intercepted(code, word):
        run.leave(code, word, vcpu.regs.rip + insn.length & MASK64, insn.length)
    else:
        run.end("a port that nobody intercepts: there is no hardware behind it")


def _check_port(run: Execution, number: int, size: int) -> None:
    vcpu = run.vcpu
    system = vcpu.system
    privileged = system.cpl <= (vcpu.regs.rflags & RFLAGS_IOPL) >> 12 and not vcpu.regs.rflags & RFLAGS_VM
    if privileged or not system.cr0 & CR0_PE:
        return
    _, _, limit, base = system.tr
    if limit < TSS_IO_MAP + 1:
        raise registers.refuse()
    read = run.machine.access.guest_read
    start = int.from_bytes(read(vcpu, base + TSS_IO_MAP, 2), "little") + (number >> 3)
    if start + 1 > limit:
        raise registers.refuse()
    bits = int.from_bytes(read(vcpu, base + start, 2), "little")
    if bits >> (number & 7) & (1 << size) - 1:
        raise registers.refuse()


def vmmcall(run: Execution, code: int, info: int) -> None:
    """VMMCALL; with F2h or F3h before it VMGEXIT, which outside SEV-ES is VMMCALL. Source: 24594, VMGEXIT."""
    data = run.fetch(4)
    prefixed = data[0] in (0xF2, 0xF3)
    if prefixed and run.encrypted_state:
        run.vmgexit()
        return
    if run.is_intercepted(code):
        run.leave(code, 0, 0, 4 if prefixed else 3)
    else:
        raise FaultUnwind(Fault(Vector.UD, 0, 0))


def time_stamp(run: Execution, code: int, info: int) -> None:
    """RDTSC; RDTSCP is #UD on this engine's processor and arrives by another way."""
    if run.is_intercepted(code):
        run.leave(code, 0, 0, 2)
        return
    regs = run.vcpu.regs
    run.pending_ticks += NATIVE_TICKS
    now = run.now() + run.vcpu.vmcb.tsc_offset
    regs.rax, regs.rdx = now & MASK32, now >> 32 & MASK32
    done(run, 2)


NATIVE_TICKS = 100
"""Virtual time of RDTSC beside that of its code."""


def caches(run: Execution, code: int, info: int) -> None:
    """WBINVD and INVD, which the engine does not tell apart."""
    opcode = run.fetch(2)
    code = ExitCode.INVD if opcode == b"\x0f\x08" else ExitCode.WBINVD
    if run.is_intercepted(code):
        run.leave(code, 0, 0, 2)
    else:
        done(run, 2)


def halt(run: Execution, code: int, info: int) -> None:
    """HLT and PAUSE."""
    length = len(run.fetch(2)) if code == ExitCode.PAUSE else 1
    if run.is_intercepted(code):
        run.leave(code, 0, 0, length)
        return
    done(run, length)
    run.vcpu.halted = code == ExitCode.HLT


def page(run: Execution, code: int, info: int) -> None:
    """INVLPG: of a large page everything, of a small one the engine drops just that. Source: spec 24594, INVLPG."""
    insn = decoded(run)
    if run.is_intercepted(code):
        run.leave(code, 0, 0, insn.length)
        return
    if run.vcpu.system.cpl:
        raise registers.refuse()
    linear = _address(run.vcpu, insn)
    if run.mmu.is_large(linear) or run.engine is None or not run.engine.drop_page():
        run.mmu.flush()
        done(run, insn.length)


def _address(vcpu: Vcpu, insn: io.Insn) -> int:
    """Linear address of an operand that is named and not accessed, which the decoder does not list; 64-bit mode."""
    from iced_x86 import Register, RegisterExt

    iced = insn.iced
    if iced.is_ip_rel_memory_operand:
        return int(iced.ip_rel_memory_address)
    linear = iced.memory_displacement
    for register, scale in ((iced.memory_base, 1), (iced.memory_index, iced.memory_index_scale)):
        if register != Register.NONE:
            number = RegisterExt.full_register(register) - Register.RAX
            linear += getattr(vcpu.regs, GPR_NAMES[number]) * scale
    segment = {Register.FS: "fs", Register.GS: "gs"}.get(iced.memory_segment)
    if segment is not None:
        linear += getattr(vcpu.system, segment)[3]
    return int(linear) & (MASK64 if insn.mode == 64 else MASK32)


def exactly(run: Execution, fault: Fault) -> Fault:
    """A fault of the instruction at RIP with its whole address: an engine's TLB knows the page alone.

    The address is that of the operand in the page; where an operand reaches into the page from the one before, and
    for an access that no operand shows (a descriptor), it is the page's first byte.
    """
    page = fault.address & -PAGE_BYTES
    vcpu = run.vcpu
    if fault.vector == Vector.PF and fault.error_code & PfError.ID:
        return fault._replace(address=max(vcpu.regs.rip, page))
    try:
        insn = io.decode(run.fetch(), code_bits(vcpu), vcpu.regs.rip)
    except FaultUnwind:
        return fault
    if not isinstance(insn, io.Insn):
        return fault
    for operand in insn.memory:
        first = io.effective_address(operand, _reader(vcpu), lambda name: _segment_base(vcpu, name), insn.mode)[1]
        gpa_page = first & -PAGE_BYTES if fault.vector == Vector.PF else _gpa_page(run, first)
        if gpa_page == page:
            return fault._replace(address=page | first & PAGE_MASK)
    return fault


def _gpa_page(run: Execution, linear: int) -> int:
    """The guest-physical page of a linear address; -1 where the guest's tables have none."""
    try:
        return run.machine.access.guest_gpa(run.vcpu, linear, 0) & -PAGE_BYTES
    except FaultUnwind:
        return -1


def _reader(vcpu: Vcpu) -> Callable[[str], int]:
    """A general register by the decoder's name, as wide as the name says."""
    from iced_x86 import Register, RegisterExt

    def read(name: str) -> int:
        register = getattr(Register, name)
        number = RegisterExt.full_register(register) - Register.RAX
        return int(getattr(vcpu.regs, GPR_NAMES[number])) & (1 << RegisterExt.size(register) * 8) - 1

    return read


def _segment_base(vcpu: Vcpu, name: str) -> int:
    """Base of a segment; ES, CS, SS, DS count as 0 in 64-bit mode."""
    if is_long(vcpu) and name in ("ES", "CS", "SS", "DS"):
        return 0
    return int(getattr(vcpu.system, name.lower())[3])


def software_interrupt(run: Execution, code: int, info: int) -> None:
    """INT n, INT3, INTO, INT1."""
    data = run.fetch(2)
    if data[0] == 0xCD:
        vector, length, kind = data[1], 2, EventType.SOFTWARE
    elif data[0] in (0xCC, 0xCE):
        vector, length, kind = (Vector.BP if data[0] == 0xCC else Vector.OF), 1, EventType.EXCEPTION
    else:
        vector, length, kind = Vector.DB, 1, EventType.EXCEPTION
    wanted = code if kind is EventType.SOFTWARE else ExitCode.EXCEPTION_0 + vector
    if run.is_intercepted(wanted):
        run.leave(wanted, vector, 0, length)
        return
    next_rip = run.vcpu.regs.rip + length & MASK64
    if vector == Vector.DB:
        run.vcpu.regs.rip = next_rip
    run.deliver(event(vector, kind), next_rip=next_rip)


def control(run: Execution, code: int, info: int) -> None:
    """MOV from and to CR0, CR4, CR8, CLTS and LMSW: intercepted, or done here with the checks the engine omits.

    A write that only a trap intercepts is done first. Source: spec 24593, 15.8.1 and 15.35.4.
    """
    vcpu = run.vcpu
    data = run.fetch(4)
    rex = data[0] if data[0] in REX else 0
    at = 1 if rex else 0
    number, write = code & 0xF, bool(code & 0x10)
    if data[at : at + 1] == b"\x0f" and data[at + 1] in (0x20, 0x22):
        general = data[at + 2] & 7 | (rex & 1) << 3
        length, word = at + 3, CR_MOV | general
        name = GPR_NAMES[general]
        value = int(getattr(vcpu.regs, name)) & (MASK64 if is_long(vcpu) else MASK32)
    else:
        length, word, name = decoded(run).length, 0, ""
        value = _implied(run, data, at)
    if run.is_intercepted(code):
        run.leave(code, word, 0, length)
        return
    if vcpu.system.cpl:
        raise registers.refuse()
    if not write:
        setattr(vcpu.regs, name, getattr(vcpu.system, f"cr{number}"))
        done(run, length)
        return
    if number == 0:
        registers.write_cr0(vcpu, value)
    elif number == 3:
        registers.write_cr3(vcpu, value)
    elif number == 4:
        registers.write_cr4(vcpu, value)
    elif value >> 4:
        raise registers.refuse()
    else:
        vcpu.system.cr8 = value
    run.mmu.flush()
    done(run, length)
    trap = ExitCode.CR0_WRITE_TRAP + number
    if run.is_intercepted(trap):
        run.leave(trap, value, 0, 0)


def _implied(run: Execution, data: bytes, at: int) -> int:
    """CR0 after CLTS or LMSW. Source: spec 24594, CLTS, LMSW (PE can be set and not cleared)."""
    vcpu = run.vcpu
    if data[at + 1] == 0x06:
        return vcpu.system.cr0 & ~8
    form = data[at + 2] if len(data) > at + 2 else 0
    if form >> 6 != 3:
        run.end("LMSW with a memory operand, which is not modelled")
        return vcpu.system.cr0
    rex = data[at - 1] if at else 0
    source = getattr(vcpu.regs, GPR_NAMES[form & 7 | (rex & 1) << 3])
    return vcpu.system.cr0 & ~0xE | int(source) & 0xF


def debug(run: Execution, code: int, info: int) -> None:
    """MOV from and to DRn."""
    vcpu = run.vcpu
    data = run.fetch(4)
    rex = data[0] if data[0] in REX else 0
    at = 1 if rex else 0
    number, write = code & 0xF, bool(code & 0x10)
    general = data[at + 2] & 7 | (rex & 1) << 3
    if run.is_intercepted(code):
        run.leave(code, general, 0, at + 3)
        return
    if vcpu.system.cpl:
        raise registers.refuse()
    if write:
        registers.write_debug(vcpu, number, getattr(vcpu.regs, GPR_NAMES[general]))
    else:
        setattr(vcpu.regs, GPR_NAMES[general], registers.read_debug(vcpu, number))
    done(run, at + 3)


def page_fault(run: Execution, code: int, info: int) -> None:
    """#PF found by an engine that walks the guest's tables itself."""
    assert run.engine is not None  # who reports
    run.exception(Vector.PF, info, run.engine.fault_address)


def nested_fault(run: Execution, code: int, info: int) -> None:
    """A nested fault of such an engine, whose reason `nested_fill` left."""
    fault, run.mmu.fault = run.mmu.fault, None
    assert fault is not None  # the engine reports none by itself
    run.raise_fault(fault)


def undefined(run: Execution, code: int, info: int) -> None:
    """#UD: instructions that the engine's processor lacks and the guest's has, else the guest's exception."""
    try:
        data = run.fetch(9)
    except FaultUnwind:
        data = b""
    at = 0
    while at < len(data) and (data[at] in (0x66, 0xF2, 0xF3) or data[at] in REX):
        at += 1
    opcode = data[at : at + 3]
    if opcode == b"\x0f\x01\xf9":
        _rdtscp(run, at + 3)
    elif opcode[:2] == b"\x0f\xc7" and len(opcode) == 3 and opcode[2] >= 0xF0:
        _random(run, data, at)
    else:
        run.exception(Vector.UD)


def _rdtscp(run: Execution, length: int) -> None:
    if run.is_intercepted(ExitCode.RDTSCP):
        run.leave(ExitCode.RDTSCP, 0, 0, length)
        return
    regs = run.vcpu.regs
    run.pending_ticks += NATIVE_TICKS
    now = run.now() + run.vcpu.vmcb.tsc_offset
    regs.rax, regs.rdx, regs.rcx = now & MASK32, now >> 32 & MASK32, run.vcpu.system.tsc_aux & MASK32
    done(run, length)


def _random(run: Execution, data: bytes, at: int) -> None:
    """RDRAND and RDSEED, from the machine's seed. Source: spec 24594, RDRAND (CF says that a number came)."""
    rex = data[at - 1] if at and data[at - 1] in REX else 0
    regs = run.vcpu.regs
    name = GPR_NAMES[data[at + 2] & 7 | (rex & 1) << 3]
    value = run.machine.entropy.take_int("engines.random", 8)
    if rex & 8:
        setattr(regs, name, value)
    elif 0x66 in data[:at]:
        setattr(regs, name, getattr(regs, name) & ~0xFFFF | value & 0xFFFF)
    else:
        setattr(regs, name, value & MASK32)
    regs.rflags = regs.rflags & ~0x8D5 | 1
    done(run, at + 3)


HANDLERS: dict[int, Callable[[Execution, int, int], None]] = {
    ExitCode.CPUID: cpuid,
    ExitCode.MSR: msr,
    ExitCode.IOIO: port,
    ExitCode.VMMCALL: vmmcall,
    ExitCode.RDTSC: time_stamp,
    ExitCode.WBINVD: caches,
    ExitCode.INVD: caches,
    ExitCode.HLT: halt,
    ExitCode.PAUSE: halt,
    ExitCode.INVLPG: page,
    ExitCode.SWINT: software_interrupt,
    ExitCode.EXCEPTION_0 + Vector.UD: undefined,
    ExitCode.EXCEPTION_0 + Vector.PF: page_fault,
    ExitCode.NPF: nested_fault,
    **dict.fromkeys(range(ExitCode.CR0_READ, ExitCode.CR0_READ + 32), control),
    **dict.fromkeys(range(ExitCode.DR0_READ, ExitCode.DR0_READ + 32), debug),
}
