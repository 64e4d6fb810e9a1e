"""A reference SVSM at VMPL0 and its caller: the calling area and the core protocol.

The caller puts its arguments into registers, marks the call in the calling area and has the hypervisor run VMPL0. The
SVSM takes the call, reads and writes the caller's registers in its save area - which only VMPL0 can - and hands back by
run VMPL. A call that comes back still pending was never taken.

Source: AMD's SVSM specification (58019), core protocol; coconut-svsm kernel/src/protocols/core.rs and
kernel/src/requests.rs; Linux arch/x86/coco/sev/core.c (svsm_perform_call_protocol).
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import Refused
from sevlab.core.layout import Layout, bits, flag, u16, u32, u64
from sevlab.core.steps import deliver_fault
from sevlab.core.units import MASK64, PAGE_2M_BYTES, PAGE_BYTES, PAGE_MASK, is_aligned
from sevlab.core.vocabulary import Boundary, Checked, Input, outcome, step
from sevlab.plugins.sev_es import MsrExit, MsrInfo, Outcome, ReferenceGuest, VcHandler, VcResult, Vmsa, msr_layout
from sevlab.plugins.sev_es import guest_side as es_side
from sevlab.plugins.snp.guest_agent import snp_vcpu
from sevlab.plugins.snp.guest_pages import SvsmCallingArea
from sevlab.plugins.snp.rmp_guest import RDX_VMSA, pvalidate, rmp_adjust
from sevlab.plugins.snp.rmp_host import RmpCode

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

SOURCE = "58019, core protocol; coconut-svsm kernel/src/protocols/core.rs"
PVALIDATE_MAX = 510
CALLER_VMPL = 1


class SvsmResult(IntEnum):
    """RAX after a call. Source: Linux arch/x86/include/asm/sev.h; coconut-svsm kernel/src/protocols/errors.rs."""

    SUCCESS = 0
    UNSUPPORTED_PROTOCOL = 0x8000_0001
    UNSUPPORTED_CALL = 0x8000_0002
    INVALID_ADDRESS = 0x8000_0003
    INVALID_PARAMETER = 0x8000_0005
    INVALID_REQUEST = 0x8000_0006
    PVALIDATE_FAIL_INPUT = 0x8000_1001
    PVALIDATE_FAIL_SIZEMISMATCH = 0x8000_1006
    PVALIDATE_NO_CHANGE = 0x8000_1010


class CoreCall(IntEnum):
    """Calls of protocol 0."""

    REMAP_CA = 0
    PVALIDATE = 1
    CREATE_VCPU = 2
    DELETE_VCPU = 3
    QUERY_PROTOCOL = 6


class SvsmPvalidate(Layout, size=8):
    """Head of the structure of the call PVALIDATE; entries follow, all in one page."""

    entries = u16(0, source=SOURCE)
    next_entry = u16(2, doc="the SVSM advances it", source=SOURCE)
    reserved_4 = u32(4, reserved=0xFFFF_FFFF, source=SOURCE)


class SvsmPvalidateEntry(Layout, size=8):
    """One page to validate or rescind."""

    page_size = bits(0, u64, 1, 0, values=(0, 1), source=SOURCE)
    validate = flag(0, u64, 2, source=SOURCE)
    ignore_carry = flag(0, u64, 3, source=SOURCE)
    reserved_4 = bits(0, u64, 11, 4, must_be_zero=True, source=SOURCE)
    page = bits(0, u64, 63, 12, source=SOURCE)


SVSM_LAYOUTS: tuple[type[Layout], ...] = (SvsmPvalidate, SvsmPvalidateEntry)


@step("snp.svsm-call", Boundary.GHCB)
class SvsmCall(NamedTuple):
    """The guest at VMPL1 calls its SVSM: `rax` protocol [63:32] and call [31:0], and the arguments.

    `caa_gpa`: its calling area; `vmsa_gpa`: its save area, which the SVSM knows from when it made it.
    """

    vcpu: Input[int]
    caa_gpa: Input[int]
    vmsa_gpa: Input[int]
    rax: Input[int]
    rcx: Input[int]
    rdx: Input[int]
    r8: Input[int]


@outcome("snp.svsm-result", Boundary.GHCB)
class SvsmAnswered(NamedTuple):
    """What the call left: `taken` False when it came back pending, then the registers mean nothing."""

    taken: Checked[bool]
    rax: Checked[int]
    rcx: Checked[int]


SVSM_RECORDS: tuple[type, ...] = (SvsmCall, SvsmAnswered)


def run_vmpl(vmpl: int) -> VcHandler:
    """Have the vCPU go on at another VMPL; the answer is judged by whoever goes on."""
    yield MsrExit(msr_layout.build(msr_layout.RunVmplRequest, MsrInfo.RUN_VMPL_REQUEST, vmpl=vmpl))
    return VcResult(Outcome.DONE)


class Caller:
    """Both ends of a call on one vCPU; `serve` may be replaced by another SVSM."""

    __slots__ = ("_guest",)

    def __init__(self) -> None:
        self._guest = ReferenceGuest("linux")

    def call(self, machine: Machine, request: SvsmCall) -> None:
        """Mark, exit, and look whether the call was taken.

        Source: Linux arch/x86/coco/sev/core.c (svsm_perform_call_protocol).
        """
        vcpu = snp_vcpu(machine, request.vcpu)
        if vcpu is None:
            return
        pages = request.caa_gpa | request.vmsa_gpa
        if vcpu.vmpl != CALLER_VMPL or pages & PAGE_MASK or max(request.caa_gpa, request.vmsa_gpa) >> 51:
            machine.emit(Refused("an SVSM is called from VMPL1, with pages"))
            return
        try:
            answer = self._converse(machine, vcpu, request)
        except FaultUnwind as unwind:
            deliver_fault(machine, vcpu, unwind.fault)
            return
        if not vcpu.stopped:
            machine.emit(answer)

    def _converse(self, machine: Machine, vcpu: Vcpu, request: SvsmCall) -> SvsmAnswered:
        access, side = machine.access, es_side(machine, vcpu)
        access.guest_physical_write(vcpu, request.caa_gpa, b"\1", c_bit=True)
        regs = vcpu.regs
        regs.rax, regs.rcx, regs.rdx, regs.r8 = request.rax, request.rcx, request.rdx, request.r8
        self._guest.converse(machine, vcpu, side, run_vmpl(0))
        if not vcpu.vmpl and not vcpu.stopped:
            serve(machine, vcpu, request.caa_gpa, request.vmsa_gpa)
            self._guest.converse(machine, vcpu, side, run_vmpl(CALLER_VMPL))
        if vcpu.stopped or vcpu.vmpl != CALLER_VMPL:
            return SvsmAnswered(False, 0, 0)
        pending = access.guest_physical_read(vcpu, request.caa_gpa, 1, c_bit=True)[0]
        access.guest_physical_write(vcpu, request.caa_gpa, b"\0", c_bit=True)
        if pending:
            return SvsmAnswered(False, 0, 0)
        return SvsmAnswered(True, vcpu.regs.rax, vcpu.regs.rcx)


def serve(machine: Machine, vcpu: Vcpu, caa_gpa: int, vmsa_gpa: int) -> None:
    """The SVSM at VMPL0: take a pending call and do it; the caller's registers are in its save area.

    Source: coconut-svsm kernel/src/requests.rs (request_loop).
    """
    access = machine.access
    area = SvsmCallingArea.from_bytes(access.guest_physical_read(vcpu, caa_gpa, PAGE_BYTES, c_bit=True))
    if area.call_pending != 1:
        return
    caller = Vmsa.from_bytes(access.guest_physical_read(vcpu, vmsa_gpa, PAGE_BYTES, c_bit=True))
    access.guest_physical_write(vcpu, caa_gpa, b"\0", c_bit=True)
    result, rcx = _core(machine, vcpu, caller) if not caller.rax >> 32 else (SvsmResult.UNSUPPORTED_PROTOCOL, None)
    answered = caller.replace(rax=int(result), rcx=caller.rcx if rcx is None else rcx)
    access.guest_physical_write(vcpu, vmsa_gpa, answered.to_bytes(), c_bit=True)


def _core(machine: Machine, vcpu: Vcpu, caller: Vmsa) -> tuple[int, int | None]:
    """A call of protocol 0: (RAX, RCX or None for unchanged)."""
    call, rcx = caller.rax & 0xFFFF_FFFF, caller.rcx
    if call == CoreCall.QUERY_PROTOCOL:
        known = rcx >> 32 == 0 and rcx & 0xFFFF_FFFF == 1
        return SvsmResult.SUCCESS, 1 << 32 | 1 if known else 0
    if call == CoreCall.REMAP_CA:
        legal = not rcx & PAGE_MASK and not rcx >> 51 and _is_valid(machine, vcpu, rcx)
        return (SvsmResult.SUCCESS if legal else SvsmResult.INVALID_ADDRESS), None
    if call == CoreCall.PVALIDATE:
        return _pvalidate(machine, vcpu, rcx), None
    if call in (CoreCall.CREATE_VCPU, CoreCall.DELETE_VCPU):
        return _vcpu_call(machine, vcpu, caller, create=call == CoreCall.CREATE_VCPU), None
    return SvsmResult.UNSUPPORTED_CALL, None


def _is_valid(machine: Machine, vcpu: Vcpu, gpa: int) -> bool:
    """Whether VMPL0 itself can use the page."""
    try:
        machine.access.guest_physical_read(vcpu, gpa, 1, c_bit=True)
    except FaultUnwind:
        return False
    return True


def _pvalidate(machine: Machine, vcpu: Vcpu, gpa: int) -> int:
    """Validate or rescind the listed pages, one after the other. Source: coconut-svsm protocols/core.rs."""
    access = machine.access
    if gpa % 8 or gpa >> 51 or not _is_valid(machine, vcpu, gpa):
        return SvsmResult.INVALID_ADDRESS
    room = PAGE_BYTES - (gpa & PAGE_MASK)
    data = access.guest_physical_read(vcpu, gpa, room, c_bit=True)
    head = SvsmPvalidate.from_bytes(data[: SvsmPvalidate.SIZE])
    end = SvsmPvalidate.SIZE * (1 + head.entries)
    if not 0 < head.entries <= PVALIDATE_MAX or end > room or head.next_entry >= head.entries or head.reserved_4:
        return SvsmResult.INVALID_REQUEST
    for number in range(head.next_entry, head.entries):
        start = SvsmPvalidate.SIZE * (1 + number)
        entry = SvsmPvalidateEntry.from_bytes(data[start : start + SvsmPvalidateEntry.SIZE])
        result = _pvalidate_one(machine, vcpu, entry)
        if result:
            return result
        access.guest_physical_write(vcpu, gpa + 2, (number + 1).to_bytes(2, "little"), c_bit=True)
    return SvsmResult.SUCCESS


def _pvalidate_one(machine: Machine, vcpu: Vcpu, entry: SvsmPvalidateEntry) -> int:
    """One entry; a page that is validated for VMPL1 gives it all rights, a rescinded one takes them first."""
    gpa = entry.page * PAGE_BYTES
    large = entry.page_size == 1
    if entry.page_size > 1 or entry.reserved_4 or gpa >> 51 or (large and not is_aligned(gpa, PAGE_2M_BYTES)):
        return SvsmResult.INVALID_PARAMETER
    validate = bool(entry.validate)
    try:
        result = pvalidate(machine, vcpu, gpa, page_size=int(large), validate=validate)
        if result.rax == RmpCode.FAIL_SIZEMISMATCH:
            return SvsmResult.PVALIDATE_FAIL_SIZEMISMATCH
        if result.rax:
            return SvsmResult.PVALIDATE_FAIL_INPUT
        if result.carry and not entry.ignore_carry:
            return SvsmResult.PVALIDATE_NO_CHANGE
        if validate:
            rmp_adjust(machine, vcpu, gpa, page_size=int(large), rdx=0xF << 8 | CALLER_VMPL)
    except FaultUnwind:
        return SvsmResult.INVALID_ADDRESS
    return SvsmResult.SUCCESS


def _vcpu_call(machine: Machine, vcpu: Vcpu, caller: Vmsa, *, create: bool) -> int:
    """Make a page a save area, or a plain page again: only VMPL0 can set the RMP's VMSA bit.

    The new vCPU must not be more privileged than its caller. Source: coconut-svsm protocols/core.rs.
    """
    gpa = caller.rcx & MASK64
    if gpa & PAGE_MASK or gpa >> 51 or not _is_valid(machine, vcpu, gpa):
        return SvsmResult.INVALID_ADDRESS
    if create:
        area = Vmsa.from_bytes(machine.access.guest_physical_read(vcpu, gpa, PAGE_BYTES, c_bit=True))
        if area.vmpl < caller.vmpl or not area.sev_features & 1 or area.sev_features != caller.sev_features:
            return SvsmResult.INVALID_PARAMETER
    rdx = RDX_VMSA | CALLER_VMPL if create else 0xF << 8 | CALLER_VMPL
    code = rmp_adjust(machine, vcpu, gpa, page_size=0, rdx=rdx)
    return SvsmResult.INVALID_PARAMETER if code else SvsmResult.SUCCESS


def register(builder: PluginBuilder) -> None:
    """Add the step."""
    builder.steps.add(SvsmCall, Caller().call)
