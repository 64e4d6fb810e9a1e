"""What the processor does for an encrypted guest: save and load its state, reflect exits as #VC, VMGEXIT.

The registers of an encrypted guest live in its VMSA, under its key. The vCPU's registers are the processor's copy
while the guest runs; the page's bytes are made from them when somebody looks, and the processor remembers what they
were: VMRUN fails when they have changed.
Source: 24593, 15.35; the published behaviour of VMRUN on a VMSA that was changed is the exit code INVALID (-1).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from sevlab.core.builder import Msr
from sevlab.core.cpu import (
    CONTROL_NESTED_PAGING,
    CONTROL_SEV,
    CONTROL_SEV_ES,
    FaultUnwind,
    end_shadow,
    illegal_state,
    leave_guest,
)
from sevlab.core.events import CpuExit, Fault, Faulted, Refused
from sevlab.core.svm import EVENT_VALID, EventType, ExitCode, Vector
from sevlab.core.units import MASK64, PAGE_BYTES, PAGE_MASK
from sevlab.plugins import sev
from sevlab.plugins.sev_es.exits import ExitClass, exit_class
from sevlab.plugins.sev_es.msr_layout import INFO_MASK, MSR_SEV_STATUS
from sevlab.plugins.sev_es.records import VcDelivered, Vmgexit
from sevlab.plugins.sev_es.save_area import load_state, state_bytes
from sevlab.plugins.sev_es.states import SevEsState, sev_es_state, vm_protocol
from sevlab.plugins.sev_es.vmsa import Vmsa

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

    VmrunEnter = Callable[[Machine, Vcpu], int | None]
    HandleVc = Callable[[Machine, Vcpu, CpuExit], None]

RFLAGS_IF = 1 << 9
GUEST_IF = 1 << 1
"""Bit of the VMCB's interrupt state: what a hypervisor learns of the guest's IF. Source: 24593, 15.35.7."""

CPUID_ENCRYPTION, CPUID_SEV_ES = 0x8000_001F, 1 << 3
SEV_ES_ACTIVE = 1 << 1
VMGEXIT_BYTES = b"\xf3\x0f\x01\xd9"
VMGEXIT = int(ExitCode.VMGEXIT)
BEHIND = frozenset((int(ExitCode.HLT), int(ExitCode.PAUSE)))
"""Automatic exits by an instruction."""
AUTOMATIC = ExitClass.AE
_exit = tuple.__new__
"""Makes an exit from its values without the keyword machinery."""
WRITE = 1
SEV_FEATURES = slice(Vmsa.FIELDS["sev_features"].offset, Vmsa.FIELDS["sev_features"].offset + 8)
ALL_ON = CONTROL_NESTED_PAGING | CONTROL_SEV | CONTROL_SEV_ES


def encrypted(vcpu: Vcpu) -> bool:
    """Whether the vCPU's state is encrypted."""
    return bool(vcpu.vmcb.encryption_control & CONTROL_SEV_ES)


# Leaving the guest ------------------------------------------------------------------------------------------------


def make_vmrun_exit(handle_vc: HandleVc | None) -> Callable[[Machine, Vcpu, CpuExit], CpuExit | None]:
    """The slot `vmrun_exit`, with the guest's #VC handler if the model runs one."""

    def vmrun_exit(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> CpuExit | None:
        """What the hypervisor sees of an exit: an automatic one without bytes and next RIP; else nothing, and #VC.

        RIP of an automatic exit by an instruction already points behind it. Source: 24593, 15.35.4; Linux
        arch/x86/kvm/svm/svm.c (svm_skip_emulated_instruction: no next RIP for SEV-ES).
        """
        vmcb = vcpu.vmcb
        if not vmcb.encryption_control & CONTROL_SEV_ES:
            return exit_
        interrupts = GUEST_IF if vcpu.regs.rflags & RFLAGS_IF else 0
        if vmcb.interrupt_state & GUEST_IF != interrupts:
            vmcb.interrupt_state = vmcb.interrupt_state & ~GUEST_IF | interrupts
        number, code, info_1, info_2, insn, next_rip = exit_
        if code != VMGEXIT:
            if exit_class(code, info_1) is not AUTOMATIC:
                machine.emit(VcDelivered(vcpu.vcpu_id, code & 0xFFFF_FFFF))
                if handle_vc is not None:
                    handle_vc(machine, vcpu, exit_)
                return None
            if code in BEHIND:
                vcpu.regs.rip = next_rip or vcpu.regs.rip + len(insn) & MASK64
                end_shadow(vcpu)
            if insn or next_rip:
                exit_ = _exit(CpuExit, (number, code, info_1, info_2, b"", 0))
        if not machine.memory.deferred(vmcb.vmsa_pa):
            _store_at_exit(machine, vcpu)
        return exit_

    return vmrun_exit


# Entering the guest -----------------------------------------------------------------------------------------------


def make_vmrun_enter(before: VmrunEnter, state: SevEsState) -> VmrunEnter:
    """The slot `vmrun_enter` behind the checks of SEV: load the encrypted state."""
    loaded = state.loaded

    def vmrun_enter(machine: Machine, vcpu: Vcpu) -> int | None:
        vmcb = vcpu.vmcb
        if (
            vmcb.encryption_control & ALL_ON == ALL_ON
            and loaded.get(vcpu.vcpu_id) == (vmcb.vmsa_pa, vmcb.guest_asid)
            and machine.memory.deferred(vmcb.vmsa_pa)
        ):
            return None  # as at the last entry, and nobody has looked at the page since
        failure = before(machine, vcpu)
        if failure is not None or not vmcb.encryption_control & CONTROL_SEV_ES:
            return failure
        if vm_protocol(machine, vcpu).snp:
            return None  # no checksums there: the RMP guards save areas, and its owner loads them
        return enter_encrypted(machine, vcpu, partial(_is_unchanged, machine, vcpu))

    return vmrun_enter


def _is_unchanged(machine: Machine, vcpu: Vcpu, page: bytes) -> bool:
    guests = sev.sev_state(machine).guests.values()
    guest = next((guest for guest in guests if guest.asid == vcpu.asid), None)
    return guest is not None and sev.vmsa_slots.matches(machine, guest, page)


def enter_encrypted(machine: Machine, vcpu: Vcpu, trusted: Callable[[bytes], bool]) -> int | None:
    """Load the encrypted state; the exit code INVALID when its page is not what was stored.

    A page that nobody looked at since it was stored cannot have changed. Any other is judged by `trusted`: in SEV-ES
    by its checksum, which lies in memory that only the ASP and the processor reach, and it must be a save area of this
    guest. One that another vCPU of the guest ran on, or that the ASP has just encrypted, is loaded whole.
    Source: 24593, 15.35.5 and 15.35.8.
    """
    loaded = sev_es_state(machine).loaded
    spa = vcpu.vmcb.vmsa_pa
    if loaded.get(vcpu.vcpu_id) == (spa, vcpu.asid) and machine.memory.deferred(spa):
        return None
    key = machine.access.key_of(vcpu.asid, c_bit=True)
    if spa & PAGE_MASK or not 0 < spa < machine.memory.size_bytes:
        return ExitCode.INVALID
    page = machine.memory.read(spa, PAGE_BYTES, key)
    if not trusted(page):
        return ExitCode.INVALID
    if loaded.get(vcpu.vcpu_id) != (spa, vcpu.asid):
        load_state(vcpu, page)
        if illegal_state(vcpu):
            return ExitCode.INVALID
        vm_protocol(machine, vcpu).sev_features = int.from_bytes(page[SEV_FEATURES], "little")
        for other in [number for number, owned in loaded.items() if owned[0] == spa]:
            del loaded[other]
        loaded[vcpu.vcpu_id] = spa, vcpu.asid
    machine.memory.defer(spa, key, partial(_store, machine, vcpu, page), vcpu.tag)
    return None


def _store_at_exit(machine: Machine, vcpu: Vcpu) -> None:
    """#VMEXIT stores the state, unless the page was not looked at since: then it is as good as stored."""
    spa = vcpu.vmcb.vmsa_pa
    if sev_es_state(machine).loaded.get(vcpu.vcpu_id) != (spa, vcpu.asid):
        return
    key = machine.access.key_of(vcpu.asid, c_bit=True)
    page = machine.memory.read(spa, PAGE_BYTES, key)
    machine.memory.defer(spa, key, partial(_store, machine, vcpu, page), vcpu.tag)


def _store(machine: Machine, vcpu: Vcpu, before: bytes) -> bytes:
    """The bytes of the save area as of now, and its checksum where nobody else reaches it."""
    page = state_bytes(vcpu, before)
    sev.vmsa_slots.update(machine, page)
    return page


def inject_filter(machine: Machine, vcpu: Vcpu, word: int) -> int:
    """The slot `inject_filter`: #VC cannot be injected. That it is dropped, not refused by VMRUN, is UNVERIFIED.

    Source: 24593, 15.35.7 and 15.20.
    """
    if not vcpu.vmcb.encryption_control & CONTROL_SEV_ES or not word & EVENT_VALID:
        return word
    kind, vector = word >> 8 & 7, word & 0xFF
    return 0 if kind == EventType.EXCEPTION and vector == Vector.VC else word


# VMGEXIT ----------------------------------------------------------------------------------------------------------


def execute_vmgexit(machine: Machine, vcpu: Vcpu, ghcb_msr: int) -> None:
    """The guest writes the GHCB MSR and executes VMGEXIT; outside SEV-ES the same bytes are VMMCALL.

    Source: 24593, 15.35.6; 24594, VMGEXIT.
    """
    if not vcpu.vmcb.encryption_control & CONTROL_SEV_ES:
        leave_guest(machine, vcpu, CpuExit(vcpu.vcpu_id, ExitCode.VMMCALL, 0, 0, VMGEXIT_BYTES, 0))
        return
    vcpu.vmcb.ghcb_gpa = ghcb_msr
    leave_guest(machine, vcpu, _exit(CpuExit, (vcpu.vcpu_id, VMGEXIT, 0, 0, b"", 0)))


def vmgexit_step(machine: Machine, step: Vmgexit) -> None:
    """A guest's VMGEXIT as a step: store the page, if there is one, and exit."""
    number, ghcb_msr, page = step
    vcpu = machine.vcpus.get(number)
    if vcpu is None:
        machine.emit(Refused(f"there is no vCPU {number}"))
        return
    if vcpu.halted or vcpu.stopped:
        machine.emit(Refused(f"vCPU {number} {'waits' if vcpu.halted else 'has stopped'}"))
        return
    if len(page) > PAGE_BYTES:
        machine.emit(Refused(f"a GHCB of {len(page)} bytes: expected at most {PAGE_BYTES}"))
        return
    try:
        if page and not ghcb_msr & INFO_MASK:
            spa, key, tag = machine.access.guest_physical(vcpu, ghcb_msr, WRITE)
            machine.memory.write(spa, page, key, tag)
        execute_vmgexit(machine, vcpu, ghcb_msr)
    except FaultUnwind as unwind:
        fault = unwind.fault
        if fault.vector == ExitCode.NPF:
            leave_guest(machine, vcpu, CpuExit(vcpu.vcpu_id, ExitCode.NPF, fault.error_code, fault.address, b"", 0))
        else:
            machine.emit(Faulted(*fault))


def make_sev_status(before: Msr) -> Msr:
    """SEV_STATUS of an encrypted guest: bit 0 SEV, bit 1 SEV-ES, from bit 2 on its SEV_FEATURES; it never exits.

    Source: 24593, 15.34.10.
    """

    def read(machine: Machine, vcpu: Vcpu | None, msr: int) -> int | Fault:
        value = 0 if before.read is None else before.read(machine, vcpu, msr)
        if vcpu is None or not isinstance(value, int) or not encrypted(vcpu):
            return value
        return value | SEV_ES_ACTIVE | vm_protocol(machine, vcpu).sev_features << 2

    return Msr(read, before.write)


def register(builder: PluginBuilder, state: SevEsState, handle_vc: HandleVc | None) -> None:
    """Take the processor's slots and the step."""
    builder.cpuid_bits(CPUID_ENCRYPTION, eax=CPUID_SEV_ES)
    builder.guest_msrs.replace(MSR_SEV_STATUS, make_sev_status)
    builder.slot("vmrun_exit", make_vmrun_exit(handle_vc))
    builder.replace_slot("vmrun_enter", lambda before: make_vmrun_enter(before, state))
    builder.slot("inject_filter", inject_filter)
    builder.steps.add(Vmgexit, vmgexit_step)
