"""The reference hypervisor's side of the NAE events that need only registers.

Nothing here looks at the vCPU's registers: a hypervisor has the GHCB and nothing else. Each event stands beside its
declaration in `EVENTS`; the cases there are what a request with one field changed is answered.
Source: 56421, 4.1; Linux arch/x86/kvm/svm/sev.c (sev_handle_vmgexit) and svm.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cpu import GPR_NAMES, Registers
from sevlab.core.hypercall import CodeMode, HypercallEnd, HypercallFrame
from sevlab.core.svm import ExitCode
from sevlab.core.units import MASK64
from sevlab.plugins.sev_es.declare import (
    DONE,
    GENERAL_PROTECTION,
    INVALID_INPUT,
    MISSING_INPUT,
    Case,
    NaeEvent,
    Need,
    Reply,
)
from sevlab.plugins.sev_es.ghcb import Ghcb, NaeCode
from sevlab.plugins.sev_es.records import Terminated
from sevlab.plugins.sev_es.scratch import Scratch
from sevlab.plugins.sev_es.states import Hold, sev_es_state, vcpu_protocol, vm_protocol

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

_reply = tuple.__new__
"""Makes a reply from all its values without the keyword machinery, for the events that guests send most."""

MASK32 = 0xFFFF_FFFF
MSR_TSC_AUX = 0xC000_0103
COUNTERS = 6
"""RDPMC takes ECX 0 to 5. Source: 24594, RDPMC."""
KVM_ENOSYS = -1000 & MASK64
"""RAX after an unknown hypercall. Source: Linux include/uapi/linux/kvm_para.h."""
CALL_REGISTERS = tuple(name for name in GPR_NAMES if name != "rsp")
RETURNED = ("rbx", "rcx", "rdx")
PREEMPTIONS_MAX = 1 << 12
CPUID_XSTATE = 0xD
JUMP_TABLE_SET, JUMP_TABLE_GET = 0, 1

DR7_RESERVED_HIGH = MASK64 ^ MASK32


def dr7_read(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """DR7 read: the last value that the guest wrote through a DR7 write.

    No guest is known to send it; that the value comes back in RAX is UNVERIFIED by the document and what KVM does
    (EXITINFO1 0 names RAX). Source: 56421, 4.1; Linux arch/x86/kvm/svm/svm.c (dr_interception).
    """
    return Reply(rax=vcpu_protocol(machine, vcpu).dr7)


def dr7_write(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """DR7 write: the value is in RAX; #GP when its upper half is not zero.

    Source: 56421, 4.1; Linux arch/x86/coco/sev/vc-handle.c (vc_handle_dr7_write); 24593, 13.1.1.
    """
    if ghcb.rax & DR7_RESERVED_HIGH:
        return GENERAL_PROTECTION
    vcpu_protocol(machine, vcpu).dr7 = ghcb.rax | 0x400
    return DONE


def rdtsc(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """RDTSC and RDTSCP: the clock with the VM's offset; RDTSCP also TSC_AUX as far as the hypervisor knows it.

    Source: 56421, 4.1; 24594, RDTSC and RDTSCP.
    """
    tsc = machine.tsc() + vcpu.vmcb.tsc_offset
    low, high = tsc & MASK32, tsc >> 32 & MASK32
    if ghcb.sw_exit_code != ExitCode.RDTSCP:
        return Reply(rax=low, rdx=high)
    handlers = machine.tables.guest_msrs.get(MSR_TSC_AUX)
    aux = handlers.read(machine, vcpu, MSR_TSC_AUX) if handlers is not None and handlers.read is not None else 0
    return Reply(rax=low, rdx=high, rcx=aux & MASK32 if isinstance(aux, int) else 0)


def rdpmc(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """RDPMC: the counters read zero; one that does not exist is #GP. Source: 56421, 4.1; 24594, RDPMC."""
    if ghcb.rcx & MASK32 >= COUNTERS:
        return GENERAL_PROTECTION
    return Reply(rax=0, rdx=0)


def cpuid(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """CPUID: leaf in RAX, subleaf in RCX; XCR0 and XSS, which leaf 0Dh depends on, are asked for and not modelled.

    Source: 56421, 4.1; Linux arch/x86/kvm/svm/sev.c.
    """
    return _reply(Reply, (0, 0, *machine.cpuid(vcpu, ghcb.rax & MASK32, ghcb.rcx & MASK32), ()))


def flush_caches(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """INVD and WBINVD: both write back, since INVD would destroy others' data. Source: 56421, 4.1."""
    machine.memory.write_back_all()
    return DONE


def msr(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """RDMSR and WRMSR: an unknown register, or a value that it does not take, is #GP without error code.

    Source: 56421, 4.1; Linux arch/x86/kvm/svm/svm.c (svm_complete_emulated_msr).
    """
    number = ghcb.rcx & MASK32
    handlers = machine.tables.guest_msrs.get(number)
    if handlers is None:
        return GENERAL_PROTECTION
    if ghcb.sw_exit_info_1:
        value = (ghcb.rdx & MASK32) << 32 | ghcb.rax & MASK32
        if handlers.write is None or handlers.write(machine, vcpu, number, value) is not None:
            return GENERAL_PROTECTION
        return DONE
    found = None if handlers.read is None else handlers.read(machine, vcpu, number)
    if not isinstance(found, int):
        return GENERAL_PROTECTION
    return _reply(Reply, (0, 0, found & MASK32, None, None, found >> 32 & MASK32, ()))


def vmmcall(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """VMMCALL: the owner of the slot `hypercall` gets the registers that the guest gave; without one, -KVM_ENOSYS.

    A register that the call needs and the guest did not give is a missing input. A call that is preempted goes on
    here: the guest would not repeat it. The encrypted guest's mode is taken for 64-bit. Besides RAX it gets the
    registers that the hypervisor's ABI returns.
    Source: 56421, 4.1; Linux arch/x86/kvm/svm/sev.c and x86.c (kvm_emulate_hypercall).
    """
    owner = machine.slots.hypercall
    if owner is None:
        return Reply(rax=KVM_ENOSYS)
    given = frozenset(name for name in CALL_REGISTERS if ghcb.is_valid(name))
    registers = Registers(**{name: getattr(ghcb, name) for name in given})
    frame = HypercallFrame(registers, cpl=ghcb.cpl, mode=CodeMode.BITS_64, given=given)
    end = owner(machine, vcpu, frame)
    for _ in range(PREEMPTIONS_MAX):
        if end is not HypercallEnd.PREEMPTED:
            break
        end = owner(machine, vcpu, frame)
    if end is HypercallEnd.MISSING_INPUT:
        return MISSING_INPUT
    values = {name: getattr(registers, name) & MASK64 for name in sorted(frame.written - {"rax"})}
    more = tuple((name, value) for name, value in values.items() if name not in RETURNED)
    rbx, rcx, rdx = (values.get(name) for name in RETURNED)
    return Reply(rax=registers.rax & MASK64, rbx=rbx, rcx=rcx, rdx=rdx, more=more)


def nothing(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """MONITOR and MWAIT: nothing to do for a model without speed. Source: 56421, 4.1."""
    return DONE


def nmi_complete(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """NMI complete: the hypervisor, which does not see the guest's IRET, may inject the next NMI.

    Source: 56421, 4.1; Linux arch/x86/kvm/svm/sev.c (SVM_VMGEXIT_NMI_COMPLETE).
    """
    if machine.slots.nmi_complete is not None:
        machine.slots.nmi_complete(machine, vcpu)
    return DONE


def ap_reset_hold(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> None:
    """AP reset hold: the vCPU sleeps; the start-up IPI answers with a SW_EXITINFO2 that is not zero.

    Source: 56421, 4.1; Linux arch/x86/kvm/svm/sev.c (sev_vcpu_deliver_sipi_vector).
    """
    vcpu_protocol(machine, vcpu).hold = Hold.PAGE
    vcpu.halted = True


def ap_jump_table(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """AP jump table: the hypervisor keeps the GPA of the guest's table, set (0) or get (1).

    Source: 56421, 4.1; Linux arch/x86/kvm/svm/sev.c (SVM_VMGEXIT_AP_JUMP_TABLE).
    """
    state = vm_protocol(machine, vcpu)
    if ghcb.sw_exit_info_1 == JUMP_TABLE_SET:
        state.jump_table_gpa = ghcb.sw_exit_info_2
        return DONE
    if ghcb.sw_exit_info_1 == JUMP_TABLE_GET:
        return Reply(info_2=state.jump_table_gpa)
    return INVALID_INPUT


def hv_features(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """Hypervisor features: the bitmap in SW_EXITINFO2. Source: 56421, 4.1."""
    return Reply(info_2=sev_es_state(machine).features)


def termination(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> None:
    """Termination: the VM ends. SW_EXITINFO1 has the reason set in bits 3:0 and the code in 11:4.

    Source: 56421, 4.1; Linux arch/x86/coco/sev/core.c (sev_es_terminate by the page).
    """
    info = ghcb.sw_exit_info_1
    machine.emit(Terminated(vcpu.vcpu_id, info & 0xF, info >> 4 & 0xFF, vcpu.vmcb.ghcb_gpa))
    machine.hypervisor.stop(machine, vcpu.vm_id, f"the guest asked for its end: set {info & 0xF}, {info >> 4 & 0xFF}")


def unsupported(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> None:
    """Unsupported event: the guest's #VC handler has no way to serve an exit code; KVM ends the run.

    Source: 56421, 4.1; Linux arch/x86/kvm/svm/sev.c (SVM_VMGEXIT_UNSUPPORTED_EVENT).
    """
    machine.hypervisor.stop(machine, vcpu.vm_id, f"the guest cannot serve #VC {ghcb.sw_exit_info_1:#x}")


def _is_xstate(ghcb: Ghcb) -> bool:
    return ghcb.rax & MASK32 == CPUID_XSTATE


def _is_write(ghcb: Ghcb) -> bool:
    return bool(ghcb.sw_exit_info_1)


PAGE, KVM = "56421, 4.1", "Linux arch/x86/kvm/svm/sev.c (sev_es_validate_vmgexit)"
ENDS, WAITS = "the VM ends", "the vCPU waits for its start-up IPI"


def _absent(*fields: str, **given: int) -> tuple[Case, ...]:
    """A required field that is not marked valid is reason 4."""
    return tuple(Case(name, "absent", None, MISSING_INPUT, given) for name in fields)


def _free(name: str, *, width: int = 64, **given: int) -> tuple[Case, ...]:
    """A field in which every value is legal: zero and the largest."""
    return Case(name, "zero", 0, DONE, given), Case(name, "limit", (1 << width) - 1, DONE, given)


def _ignored_infos(note: str = "not looked at") -> tuple[Case, ...]:
    """An event without arguments does not look at the infos."""
    return tuple(
        Case(name, kind, value, DONE, note=note)
        for name in ("sw_exit_info_1", "sw_exit_info_2")
        for kind, value in (("zero", 0), ("reserved", MASK64))
    )


INFOS = _absent("sw_exit_info_1", "sw_exit_info_2")

EVENTS: dict[int, NaeEvent] = {
    ExitCode.DR7_READ: NaeEvent(
        "DR7 read", dr7_read, outputs=("rax",), cases=(*INFOS, *_ignored_infos()), source=f"{PAGE}; {KVM}"
    ),
    ExitCode.DR7_WRITE: NaeEvent(
        "DR7 write",
        dr7_write,
        required=("rax",),
        example={"rax": 0x400},
        cases=(
            *INFOS,
            *_ignored_infos(),
            *_absent("rax"),
            Case("rax", "zero", 0, DONE),
            Case("rax", "limit", MASK32, DONE),
            Case("rax", "past", 1 << 32, GENERAL_PROTECTION),
        ),
        source=f"{PAGE}; {KVM}",
    ),
    ExitCode.RDTSC: NaeEvent(
        "RDTSC",
        rdtsc,
        context=("sw_exit_code",),
        outputs=("rax", "rdx"),
        cases=(*INFOS, *_ignored_infos()),
        source=f"{PAGE}; {KVM}",
    ),
    ExitCode.RDPMC: NaeEvent(
        "RDPMC",
        rdpmc,
        required=("rcx",),
        outputs=("rax", "rdx"),
        example={"rcx": 0},
        cases=(
            *INFOS,
            *_ignored_infos(),
            *_absent("rcx"),
            Case("rcx", "zero", 0, DONE),
            Case("rcx", "limit", COUNTERS - 1, DONE),
            Case("rcx", "past", COUNTERS, GENERAL_PROTECTION),
            Case("rcx", "reserved", 1 << 32, DONE, note="bits 63:32 are not ECX"),
        ),
        source=f"{PAGE}; {KVM}",
    ),
    ExitCode.CPUID: NaeEvent(
        "CPUID",
        cpuid,
        required=("rax", "rcx"),
        optional=("xcr0", "xss"),
        needs=(Need(("xcr0",), "leaf 0Dh", _is_xstate),),
        outputs=("rax", "rbx", "rcx", "rdx"),
        example={"rax": 0x8000_001F, "rcx": 0, "xcr0": 1},
        cases=(
            *INFOS,
            *_ignored_infos(),
            *_absent("rax", "rcx"),
            *_free("rax"),
            *_free("rcx"),
            Case("xcr0", "absent", None, DONE, note="any other leaf"),
            Case("xcr0", "absent", None, MISSING_INPUT, {"rax": CPUID_XSTATE}, "leaf 0Dh"),
            Case("xcr0", "zero", 0, DONE),
            Case("xcr0", "limit", MASK64, DONE),
            Case("xss", "absent", None, DONE, {"rax": CPUID_XSTATE, "rcx": 1}, "reads 0"),
            *_free("xss"),
        ),
        source=f"{PAGE}; {KVM}",
    ),
    ExitCode.INVD: NaeEvent("INVD", flush_caches, cases=(*INFOS, *_ignored_infos()), source=f"{PAGE}; {KVM}"),
    ExitCode.MSR: NaeEvent(
        "MSR",
        msr,
        required=("rcx",),
        optional=("rax", "rdx"),
        needs=(Need(("rax", "rdx"), "write", _is_write),),
        outputs=("rax", "rdx"),
        example={"rcx": 0x1234_5678},
        cases=(
            *INFOS,
            *_absent("rcx"),
            *_absent("rax", "rdx", sw_exit_info_1=1, rax=0, rdx=0),
            Case("sw_exit_info_1", "zero", 0, GENERAL_PROTECTION, note="a read of a register that does not exist"),
            Case("sw_exit_info_1", "limit", 1, GENERAL_PROTECTION, {"rax": 0, "rdx": 0}, "a write of it"),
            Case("sw_exit_info_1", "past", 2, GENERAL_PROTECTION, {"rax": 0, "rdx": 0}, "not zero: a write"),
            Case("sw_exit_info_2", "reserved", MASK64, GENERAL_PROTECTION, note="not looked at"),
            Case("rcx", "zero", 0, GENERAL_PROTECTION, note="no such register"),
            Case("rcx", "reserved", MASK64 ^ MASK32 | 0x1234_5678, GENERAL_PROTECTION, note="bits 63:32 are not ECX"),
            Case("rax", "zero", 0, GENERAL_PROTECTION, {"sw_exit_info_1": 1, "rdx": 0}),
            Case("rdx", "zero", 0, GENERAL_PROTECTION, {"sw_exit_info_1": 1, "rax": 0}),
        ),
        source=f"{PAGE}; {KVM}",
    ),
    ExitCode.VMMCALL: NaeEvent(
        "VMMCALL",
        vmmcall,
        required=("rax", "cpl"),
        optional=tuple(name for name in CALL_REGISTERS if name != "rax"),
        outputs=("rax",),
        example={"rax": 0, "cpl": 0},
        cases=(
            *INFOS,
            *_ignored_infos(),
            *_absent("rax", "cpl"),
            *_free("rax"),
            *_free("cpl", width=8),
            *(
                case
                for name in CALL_REGISTERS
                if name != "rax"
                for case in (Case(name, "absent", None, DONE, note="no hypercall needs it"), *_free(name))
            ),
        ),
        source=f"{PAGE}; {KVM}",
    ),
    ExitCode.RDTSCP: NaeEvent(
        "RDTSCP",
        rdtsc,
        context=("sw_exit_code",),
        outputs=("rax", "rcx", "rdx"),
        cases=(*INFOS, *_ignored_infos()),
        source=f"{PAGE}; {KVM}",
    ),
    ExitCode.WBINVD: NaeEvent("WBINVD", flush_caches, cases=(*INFOS, *_ignored_infos()), source=f"{PAGE}; {KVM}"),
    ExitCode.MONITOR: NaeEvent(
        "MONITOR",
        nothing,
        required=("rax", "rcx", "rdx"),
        example={"rax": 0, "rcx": 0, "rdx": 0},
        cases=(
            *INFOS,
            *_ignored_infos(),
            *_absent("rax", "rcx", "rdx"),
            *_free("rax"),
            *_free("rcx"),
            *_free("rdx"),
        ),
        source=f"{PAGE}; {KVM}",
    ),
    ExitCode.MWAIT: NaeEvent(
        "MWAIT",
        nothing,
        required=("rax", "rcx"),
        example={"rax": 0, "rcx": 0},
        cases=(*INFOS, *_ignored_infos(), *_absent("rax", "rcx"), *_free("rax"), *_free("rcx")),
        source=f"{PAGE}; {KVM}",
    ),
    NaeCode.NMI_COMPLETE: NaeEvent(
        "NMI complete", nmi_complete, cases=(*INFOS, *_ignored_infos()), source=f"{PAGE}; {KVM}"
    ),
    NaeCode.AP_RESET_HOLD: NaeEvent(
        "AP reset hold",
        ap_reset_hold,
        cases=(*INFOS, *(case._replace(expect=None, note=WAITS) for case in _ignored_infos())),
        source=f"{PAGE}; {KVM}",
    ),
    NaeCode.AP_JUMP_TABLE: NaeEvent(
        "AP jump table",
        ap_jump_table,
        example={"sw_exit_info_1": JUMP_TABLE_GET},
        cases=(
            *INFOS,
            Case("sw_exit_info_1", "zero", 0, DONE, {"sw_exit_info_2": 0x9000}, "set"),
            Case("sw_exit_info_1", "limit", 1, DONE, note="get: nothing is set yet"),
            Case("sw_exit_info_1", "past", 2, INVALID_INPUT),
            Case("sw_exit_info_1", "reserved", 1 << 32, INVALID_INPUT),
            Case("sw_exit_info_2", "zero", 0, DONE, {"sw_exit_info_1": 0}, "set to none"),
            Case("sw_exit_info_2", "limit", MASK64, DONE, {"sw_exit_info_1": 0}, "kept, not judged"),
        ),
        source=f"{PAGE}; {KVM}",
    ),
    NaeCode.HV_FEATURES: NaeEvent(
        "hypervisor features", hv_features, since=2, cases=(*INFOS, *_ignored_infos()), source=f"{PAGE}; {KVM}"
    ),
    NaeCode.TERMINATION: NaeEvent(
        "termination",
        termination,
        since=2,
        cases=(*INFOS, *(case._replace(expect=None, note=ENDS) for case in _ignored_infos())),
        source=f"{PAGE}; {KVM}",
    ),
    NaeCode.UNSUPPORTED: NaeEvent(
        "unsupported event",
        unsupported,
        cases=(*INFOS, *(case._replace(expect=None, note=ENDS) for case in _ignored_infos())),
        source=f"{PAGE}; {KVM}",
    ),
}
"""By exit code; IOIO and MMIO are in `io_events`."""
