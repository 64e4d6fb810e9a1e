"""Hyper-V's own use of the GHCB page: a hypercall when GHCB_USAGE is 1, a return to another VTL when it is 2.

For a hypercall the page is the input, followed by the GPA of the output and the control word, which the result
replaces. The call goes to whoever owns hypercalls in the machine, with the registers that a VMMCALL of that ABI has.
Source: openvmm vm/x86/x86defs/src/snp.rs (usage values); Linux arch/x86/hyperv/ivm.c (union hv_ghcb,
hv_ghcb_hypercall).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cpu import Registers
from sevlab.core.hypercall import CodeMode, HypercallEnd, HypercallFrame
from sevlab.core.layout import Layout, bits, raw_bytes, u16, u64
from sevlab.plugins.sev_es.ghcb import Usage

if TYPE_CHECKING:
    from sevlab.core.buffers import SharedBuffer
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

STATUS_INVALID_HYPERCALL_CODE, STATUS_INVALID_HYPERCALL_INPUT = 2, 3
SOURCE = "Linux arch/x86/hyperv/ivm.c (union hv_ghcb)"


class HypervPage(Layout, size=4096):
    """A GHCB page with usage 1."""

    hypercall_data = raw_bytes(0x000, 509 * 8, source=SOURCE)
    output_gpa = u64(0xFE8, source=SOURCE)
    call_code = u16(0xFF0, doc="the status afterwards", source=SOURCE)
    fast = bits(0xFF2, u16, 0, 0, source=SOURCE)
    element_count = bits(0xFF4, u16, 11, 0, source=SOURCE)
    start_index = bits(0xFF6, u16, 11, 0, source=SOURCE)


CALL_RAX = 1 << 31
"""How a hypercall page marks calls of this ABI. Source: Xen xen/arch/x86/hvm/viridian/viridian.c."""
FAST = 1 << 16
GIVEN = frozenset(("rax", "rcx", "rdx", "r8"))
CONTROL = slice(HypervPage.FIELDS["call_code"].offset, HypervPage.FIELDS["call_code"].offset + 8)
CONTINUATIONS_MAX = 4096


def serve(machine: Machine, vcpu: Vcpu, window: SharedBuffer, page: bytes, usage: int) -> None:
    """A page of Hyper-V's: a return to a VTL, of which there is one only, does nothing (UNVERIFIED); else a call."""
    from sevlab.plugins.sev_es.records import VmgexitIgnored

    if usage == Usage.HYPERV_VTL_RETURN:
        machine.emit(VmgexitIgnored(vcpu.vcpu_id, "Hyper-V: a return to a VTL, and there is one only"))
        return
    control = int.from_bytes(page[CONTROL], "little")
    result = hypercall(machine, vcpu, control, HypervPage.from_bytes(page).output_gpa)
    window.write_uint(CONTROL.start, 8, result)
    reason = f"Hyper-V hypercall {control & 0xFFFF:#x}: status {result & 0xFFFF:#x}"
    machine.emit(VmgexitIgnored(vcpu.vcpu_id, reason))


def hypercall(machine: Machine, vcpu: Vcpu, control: int, output_gpa: int) -> int:
    """The result of a call whose input is the GHCB page: status [15:0], elements done [43:32].

    Without an owner every code is invalid; a fast call, whose input is in registers, is an invalid input (UNVERIFIED).
    A call that is preempted goes on here.
    """
    owner = machine.slots.hypercall
    if owner is None:
        return STATUS_INVALID_HYPERCALL_CODE
    if control & FAST:
        return STATUS_INVALID_HYPERCALL_INPUT
    registers = Registers(rax=CALL_RAX, rcx=control, rdx=vcpu.vmcb.ghcb_gpa, r8=output_gpa)
    frame = HypercallFrame(registers, cpl=0, mode=CodeMode.BITS_64, given=GIVEN)
    for _ in range(CONTINUATIONS_MAX):
        if owner(machine, vcpu, frame) is not HypercallEnd.PREEMPTED:
            break
    unknown = registers.rax >> 63  # the owner speaks another ABI and says so by an error number
    return STATUS_INVALID_HYPERCALL_CODE if unknown or "rax" not in frame.written else registers.rax
