"""A virtual CPU: its registers, its VMCB, and what the hardware does at VMRUN and #VMEXIT.

What belongs to a feature (encrypted state, #VC, RMP checks) hangs in the slots of `core.machine`; here is only what
every SVM processor does. Source: spec 24593 (APM volume 2), 15.5 to 15.20 and appendix B.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from sevlab.core.errors import InvariantViolation
from sevlab.core.events import CpuExit, Fault, Injected, NotIntercepted, Refused, Resumed, VmExit
from sevlab.core.layout import Layout, raw_bytes, u8, u32, u64
from sevlab.core.memory import guest_tag
from sevlab.core.paging import CR0_PG, CR4_PAE, EFER_LME
from sevlab.core.state import Stateful, new
from sevlab.core.svm import ALWAYS_EXITS, EVENT_VALID, EventType, ExitCode, Vector

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

_record = tuple.__new__
"""Makes a record from its values without the keyword machinery: a third of the time, at every exit and entry."""

GPR_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
"""General registers in the order of their encoding."""

INSN_BYTES_MAX = 15

CR0_PE = 1 << 0
CS_LONG_AND_BIG = 3 << 9
"""Bits L and D of a segment's attributes in the VMCB's format."""
EVENTS_NOT_EXCEPTIONS = (Vector.NMI, *range(32, 256))

INTERRUPT_SHADOW = 1 << 0
"""Bit of the VMCB's interrupt state."""
CONTROL_NESTED_PAGING = 1 << 0
CONTROL_SEV = 1 << 1
CONTROL_SEV_ES = 1 << 2
"""Bits of the VMCB word at 090h."""


class FaultUnwind(Exception):  # not an error: the way out of the middle of an instruction
    """Carries a `Fault` out of the middle of an access; caught in this package, never seen outside."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault)
        self.fault = fault


class VmcbControl(Layout, size=0x400):
    """Control area of the VMCB."""

    intercepts = raw_bytes(0x000, 24, doc="192 intercept bits; bit n is exit code n", source="24593, appendix B")
    pause_threshold_and_count = u32(0x03C, source="24593, appendix B")
    iopm_base_pa = u64(0x040, aligned=4096, source="24593, appendix B")
    msrpm_base_pa = u64(0x048, aligned=4096, source="24593, appendix B")
    tsc_offset = u64(0x050, source="24593, appendix B")
    guest_asid = u32(0x058, source="24593, appendix B")
    tlb_control = u8(0x05C, values=(0, 1, 3, 7), source="24593, appendix B")
    vintr = u64(0x060, source="24593, appendix B")
    interrupt_state = u64(0x068, doc="bit 0 shadow, bit 1 guest IF", source="24593, appendix B")
    exit_code = u64(0x070, source="24593, appendix B")
    exit_info_1 = u64(0x078, source="24593, appendix B")
    exit_info_2 = u64(0x080, source="24593, appendix B")
    exit_int_info = u64(0x088, source="24593, appendix B")
    encryption_control = u64(0x090, doc="bit 0 nested paging, 1 SEV, 2 SEV-ES", source="24593, appendix B")
    avic_apic_bar = u64(0x098, source="24593, appendix B")
    ghcb_gpa = u64(0x0A0, source="24593, appendix B")
    event_inj = u64(0x0A8, source="24593, 15.20")
    nested_cr3 = u64(0x0B0, source="24593, appendix B")
    lbr_control = u64(0x0B8, source="24593, appendix B")
    clean_bits = u32(0x0C0, source="24593, 15.15")
    next_rip = u64(0x0C8, source="24593, 15.7.1")
    insn_length = u8(0x0D0, doc="bytes fetched, low 4 bits", source="24593, 15.8.4")
    insn_bytes = raw_bytes(0x0D1, INSN_BYTES_MAX, source="24593, 15.8.4")
    avic_tables = raw_bytes(0x0E0, 0x20, source="24593, appendix B")
    vmsa_pa = u64(0x108, source="24593, appendix B")
    bus_lock_counter = u32(0x120, source="Linux arch/x86/include/asm/svm.h")
    allowed_sev_features = u64(0x138, source="24593, appendix B")
    guest_sev_features = u64(0x140, source="Linux arch/x86/include/asm/svm.h")


class Registers(Stateful):
    """What an instruction may change: general registers, RIP, RFLAGS; 64 bits each."""

    rax: int = 0
    rcx: int = 0
    rdx: int = 0
    rbx: int = 0
    rsp: int = 0
    rbp: int = 0
    rsi: int = 0
    rdi: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2


SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr")

Segment = tuple[int, int, int, int]
"""Selector (16 bit), attributes (12 bit, VMCB format), limit (32 bit), base (64 bit)."""

DATA_SEGMENT: Segment = (0, 0x93, 0xFFFF, 0)


class SystemRegisters(Stateful):
    """What changes rarely: segments, control and debug registers, the MSRs that VMRUN switches.

    Values at reset: spec 24593, table 14-1; EFER.SVME is set, since VMRUN refuses a guest without it.
    """

    es: Segment = DATA_SEGMENT
    cs: Segment = (0xF000, 0x9B, 0xFFFF, 0xFFFF_0000)
    ss: Segment = DATA_SEGMENT
    ds: Segment = DATA_SEGMENT
    fs: Segment = DATA_SEGMENT
    gs: Segment = DATA_SEGMENT
    gdtr: Segment = (0, 0, 0xFFFF, 0)
    ldtr: Segment = (0, 0x82, 0xFFFF, 0)
    idtr: Segment = (0, 0, 0xFFFF, 0)
    tr: Segment = (0, 0x8B, 0xFFFF, 0)
    cpl: int = 0
    cr0: int = 0x6000_0010
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0x1000
    dr6: int = 0xFFFF_0FF0
    dr7: int = 0x400
    debug_addresses: tuple[int, ...] = (0,) * 4
    """DR0 to DR3."""
    xcr0: int = 1
    xss: int = 0
    g_pat: int = 0x0007_0406_0007_0406
    star: int = 0
    lstar: int = 0
    cstar: int = 0
    sfmask: int = 0
    kernel_gs_base: int = 0
    sysenter_cs: int = 0
    sysenter_esp: int = 0
    sysenter_eip: int = 0
    tsc_aux: int = 0
    xmm: tuple[int, ...] = (0,) * 16


class Vmcb(Stateful):
    """The control area as the processor holds it; `VmcbControl` is the same thing as bytes."""

    intercepts: int = 0
    iopm_base_pa: int = 0
    msrpm_base_pa: int = 0
    tsc_offset: int = 0
    guest_asid: int = 0
    tlb_control: int = 0
    vintr: int = 0
    interrupt_state: int = 0
    exit_code: int = 0
    exit_info_1: int = 0
    exit_info_2: int = 0
    exit_int_info: int = 0
    encryption_control: int = CONTROL_NESTED_PAGING
    ghcb_gpa: int = 0
    event_inj: int = 0
    nested_cr3: int = 0
    lbr_control: int = 0
    clean_bits: int = 0
    next_rip: int = 0
    insn_bytes: bytes = b""
    vmsa_pa: int = 0
    allowed_sev_features: int = 0

    def to_bytes(self) -> bytes:
        """The 1024 bytes of the control area."""
        fields: dict[str, int | bytes] = {name: getattr(self, name) for name in self.FIELDS}
        fields["intercepts"] = self.intercepts.to_bytes(24, "little")
        fields["insn_length"] = len(self.insn_bytes)
        fields["insn_bytes"] = self.insn_bytes.ljust(INSN_BYTES_MAX, b"\0")
        return VmcbControl.build(**fields)

    def load_bytes(self, control_area: bytes) -> None:
        """Take over the 1024 bytes of a control area, whatever is in them."""
        area = VmcbControl.from_bytes(control_area)
        for name in self.FIELDS:
            if name not in ("intercepts", "insn_bytes"):
                setattr(self, name, getattr(area, name))
        self.intercepts = int.from_bytes(area.intercepts, "little")
        self.insn_bytes = area.insn_bytes[: area.insn_length & 0xF]

    def intercept(self, *exit_codes: int) -> None:
        """Set the intercept bits of these exit codes (each below C0h)."""
        for exit_code in exit_codes:
            self.intercepts |= 1 << exit_code


class Vcpu(Stateful):
    """One virtual CPU of VM `vm_id`; an actor on its own behalf (see `core.access`)."""

    vcpu_id: int = 0
    vm_id: int = 0
    vmpl: int = 0
    halted: bool = False
    stopped: bool = False
    regs: Registers = new(Registers)
    system: SystemRegisters = new(SystemRegisters)
    vmcb: Vmcb = new(Vmcb)

    @property
    def asid(self) -> int:
        """The address-space identifier that VMRUN loaded."""
        return self.vmcb.guest_asid

    @property
    def tag(self) -> int:
        """The owner tag of this guest's private data."""
        return guest_tag(self.vm_id)


def intercepted(machine: Machine, vcpu: Vcpu, exit_code: int, exit_info_1: int) -> bool:
    """Whether the VMCB makes the hardware leave the guest for this.

    IOIO and MSR also need the port's or register's bit in the permission map; a port access wider than a byte tests a
    bit for each byte. Source: spec 24593, 15.10 and 15.11.
    """
    if exit_code >= ALWAYS_EXITS:
        return True
    vmcb = vcpu.vmcb
    if not vmcb.intercepts >> exit_code & 1:
        return False
    if exit_code == IOIO:
        port = exit_info_1 >> 16 & 0xFFFF
        width_bytes = exit_info_1 >> 4 & 7
        bits = int.from_bytes(machine.memory.read(vmcb.iopm_base_pa + (port >> 3), 2, None), "little")
        return bits >> (port & 7) & ((1 << width_bytes) - 1) != 0
    if exit_code == MSR:
        bit = msr_permission_bit(vcpu.regs.rcx & 0xFFFF_FFFF)
        if bit is None:
            return True
        bit += exit_info_1 & 1
        return bool(machine.memory.read(vmcb.msrpm_base_pa + (bit >> 3), 1, None)[0] >> (bit & 7) & 1)
    return True


IOIO, MSR = int(ExitCode.IOIO), int(ExitCode.MSR)

MSRPM_RANGES = ((0x0000_0000, 0x000), (0xC000_0000, 0x800), (0xC001_0000, 0x1000))
"""First register and byte offset of each 8192-register range. Source: spec 24593, 15.11."""


def msr_permission_bit(msr: int) -> int | None:
    """Bit number of RDMSR `msr` in the permission map (WRMSR is the next one); None outside: always intercepted."""
    for first, offset_bytes in MSRPM_RANGES:
        if first <= msr < first + 0x2000:
            return offset_bytes * 8 + (msr - first) * 2
    return None


def leave_guest(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """What happens when the guest does something that may be intercepted.

    The slot `vmrun_exit` sees the exit first and returns what the hypervisor will see, or None when the guest handles
    it itself (#VC).
    """
    if vcpu.stopped:
        machine.emit(Refused(f"vCPU {vcpu.vcpu_id} has stopped"))
        return
    code = exit_.exit_code
    if code < ALWAYS_EXITS and not intercepted(machine, vcpu, code, exit_.exit_info_1):
        native = machine.tables.native.get(code)
        if native is None:
            machine.emit(NotIntercepted(exit_.vcpu, code))
        else:
            native(machine, vcpu, exit_)
        return
    to_hypervisor = machine.slots.vmrun_exit
    if to_hypervisor is not None:
        visible = to_hypervisor(machine, vcpu, exit_)
        if visible is None:
            return
        exit_ = visible
    vmexit(machine, vcpu, exit_)
    machine.hypervisor.handle_exit(machine, vcpu, exit_)


def vmexit(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
    """#VMEXIT: the VMCB tells the hypervisor what happened. Source: spec 24593, 15.6."""
    vmcb = vcpu.vmcb
    number, code, info_1, info_2, insn, vmcb.next_rip = exit_
    vmcb.exit_code, vmcb.exit_info_1, vmcb.exit_info_2 = code, info_1, info_2
    vmcb.insn_bytes = insn[:INSN_BYTES_MAX] if insn else insn
    machine.emit(_record(VmExit, (number, code, info_1, info_2)))


EFER_SVME = 1 << 12
CR0_CD, CR0_NW = 1 << 30, 1 << 29
INTERCEPT_VMRUN = 1 << ExitCode.VMRUN
EVENT_TYPES = (EventType.INTERRUPT, EventType.NMI, EventType.EXCEPTION, EventType.SOFTWARE)


def illegal_state(vcpu: Vcpu) -> str:
    """Why VMRUN refuses this VMCB and guest state; empty when it does not.

    Source: spec 24593, 15.5.1 (canonicalization and consistency checks) and 15.20 (event injection).
    """
    vmcb, system = vcpu.vmcb, vcpu.system
    if not vmcb.guest_asid:
        return "the ASID is 0"
    if not vmcb.intercepts & INTERCEPT_VMRUN:
        return "VMRUN is not intercepted"
    word = vmcb.event_inj
    if word & EVENT_VALID:
        kind, vector = word >> 8 & 7, word & 0xFF
        if kind not in EVENT_TYPES:
            return "EVENTINJ has a reserved type"
        if kind == EventType.EXCEPTION and vector in EVENTS_NOT_EXCEPTIONS:
            return "EVENTINJ injects as exception a vector that is none"
    return _illegal_registers(system.cr0, system.cr4, system.efer, system.dr6, system.dr7, system.cs[1])


@lru_cache(maxsize=1024)  # few combinations occur, and every VMRUN asks
def _illegal_registers(cr0: int, cr4: int, efer: int, dr6: int, dr7: int, cs_attributes: int) -> str:
    long_paging = bool(efer & EFER_LME and cr0 & CR0_PG)
    checks = (
        (not efer & EFER_SVME, "EFER.SVME is 0"),
        (cr0 & CR0_NW and not cr0 & CR0_CD, "CR0.NW is 1 while CR0.CD is 0"),
        (cr0 >> 32, "CR0[63:32] is not 0"),
        (dr6 >> 32 or dr7 >> 32, "DR6[63:32] or DR7[63:32] is not 0"),
        (long_paging and not cr4 & CR4_PAE, "long mode with paging, but CR4.PAE is 0"),
        (long_paging and not cr0 & CR0_PE, "long mode with paging, but CR0.PE is 0"),
        (long_paging and cs_attributes & CS_LONG_AND_BIG == CS_LONG_AND_BIG, "CS has both L and D"),
    )
    return next((why for wrong, why in checks if wrong), "")


def vmrun(machine: Machine, vcpu: Vcpu) -> bool:
    """VMRUN: check the VMCB, enter the guest, deliver what EVENTINJ asks for; False if the entry failed.

    A failed entry is a #VMEXIT with code INVALID and changes nothing in the guest. Source: spec 24593, 15.5.1.
    """
    vmcb, slots = vcpu.vmcb, machine.slots
    failure: int | None
    if illegal_state(vcpu):
        failure = ExitCode.INVALID
    else:
        failure = None if slots.vmrun_enter is None else slots.vmrun_enter(machine, vcpu)
    if failure is not None:
        vmexit(machine, vcpu, CpuExit(vcpu.vcpu_id, failure, 0, 0, b"", 0))
        return False
    word = vmcb.event_inj
    if word & EVENT_VALID:
        vmcb.event_inj = 0
        if slots.inject_filter is not None:
            word = slots.inject_filter(machine, vcpu, word)
        if word:
            machine.emit(Injected(vcpu.vcpu_id, word))
    machine.emit(_record(Resumed, (vcpu.vcpu_id, vcpu.regs.rip)))
    return True


def visible_registers(machine: Machine, vcpu: Vcpu) -> Registers:
    """The guest's registers as the hypervisor may use them.

    Raises `InvariantViolation` ("cpu.encrypted-state") when the guest's register state is encrypted: a handler that
    gets there read what no hypervisor can read.
    """
    if vcpu.vmcb.encryption_control & CONTROL_SEV_ES:
        raise InvariantViolation("cpu.encrypted-state", f"the hypervisor reads registers of vCPU {vcpu.vcpu_id}")
    return vcpu.regs


def skip_instruction(vcpu: Vcpu, exit_: CpuExit) -> None:
    """Let RIP point behind the instruction: next RIP where the CPU saves it, else by the length of the bytes."""
    vcpu.regs.rip = exit_.next_rip or (vcpu.regs.rip + len(exit_.insn)) & 0xFFFF_FFFF_FFFF_FFFF
    end_shadow(vcpu)


def end_shadow(vcpu: Vcpu) -> None:
    """An instruction that was executed for the guest ends the interrupt shadow of the one before it.

    Source: spec 24593, 15.21.5; Linux arch/x86/kvm/svm/svm.c, svm_set_interrupt_shadow.
    """
    if vcpu.vmcb.interrupt_state & INTERRUPT_SHADOW:
        vcpu.vmcb.interrupt_state &= ~INTERRUPT_SHADOW


# Engines ----------------------------------------------------------------------------------------------------------


class EngineSink(Protocol):
    """The kernel's side of an engine: it decides, the engine executes. All engines have the same."""

    def fill(self, gva: int, kind: int, cpl: int) -> tuple[int, int] | None:
        """A translation that the engine lacks: (SPA of the page, rights: 1 read, 2 write, 4 execute).

        `kind` is READ, WRITE or FETCH of `core.access`. None: the access does not happen; the engine ends `run` before
        the instruction.
        """

    def nested_fill(self, gpa: int, kind: int) -> tuple[int, int] | None:
        """A nested translation that an engine lacks which walks the guest's tables itself; the answer as of `fill`.

        `gpa` has the C-bit in it. None: the engine reports exit NPF.
        """

    def exit(self, exit_code: int, exit_info_1: int) -> None:
        """The guest is about to do what SVM can intercept; its registers are in the vCPU, RIP at the instruction.

        Whatever the sink leaves in the vCPU is what the engine goes on with.
        """


class CpuEngine(Protocol):
    """Executes one vCPU's instructions and reports what SVM could intercept; nothing else.

    Which exit goes to whom, page walks, event delivery and time are the kernel's.
    """

    name: str

    def run(self, ticks: int) -> bool:
        """Execute until `stop`, a refused `fill` (False), or about `ticks` have passed (True).

        A tick is about an instruction, and the same code always takes the same.
        """

    def limit(self, ticks: int) -> None:
        """From within a report: end `run` after about `ticks` from now, if it would end later."""

    def charge(self, code_bytes: int) -> None:
        """The kernel executed an instruction of so many bytes in the engine's place: as much time passes."""

    def elapsed(self) -> int:
        """Ticks of execution since this was asked last."""

    def stop(self) -> None:
        """From within a report: end `run` when the report has been dealt with."""

    @property
    def fault_address(self) -> int:
        """From within the report of a #PF: the linear address. Only an engine that walks the guest's tables has any."""

    def flush(self) -> None:
        """Forget every translation."""

    def withdraw(self, spa: int) -> None:
        """Forget every translation that leads to the page at `spa`."""

    def forget(self) -> None:
        """Forget every translation, also nested ones."""

    def drop_page(self) -> bool:
        """From within the report of an INVLPG: forget the translation of its one page; False: only `flush` can."""

    def spoiled(self, spa: int) -> None:
        """The bytes of the page at `spa` changed without the guest's doing: forget code made from it."""

    def synchronise(self) -> None:
        """Bring the registers that reports leave out (system-call MSRs, XMM) into the vCPU."""
