"""Hyper-V hypercalls that Xen offers: TLB flushes and IPIs by sets of virtual processors.

Their parameters are at guest-physical addresses, or in registers (fast), in every ABI: with shared parameter pages they
survive encryption. Source: Xen xen/arch/x86/hvm/viridian/viridian.c (viridian_hypercall and below).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from sevlab.core.buffers import CheckedBuffer
from sevlab.core.hypercall import CodeMode, HypercallEnd, HypercallFrame
from sevlab.core.layout import Layout
from sevlab.core.memory import split_pages
from sevlab.core.units import MASK32, MASK64, PAGE_MASK, PAGE_SHIFT
from sevlab.plugins import io
from sevlab.plugins.xen.arguments import BankContents, HvFlush, HvFlushEx, HvSendIpi, HvSendIpiEx
from sevlab.plugins.xen.frames import fetch, page_of
from sevlab.plugins.xen.numbers import HYPERV_FLAG, HvCall, HvStatus
from sevlab.plugins.xen.records import Hypercalled

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine
    from sevlab.plugins.xen.state import Domain

MAX_VCPUS = 128
"""HVM_MAX_VCPUS: virtual processors beyond are ignored. Source: xen/include/public/hvm/hvm_info_table.h."""
VPS_PER_BANK = 64
BANK_BYTES = 8
MASK_BANKS = MAX_VCPUS // VPS_PER_BANK
FLUSH_ALL_PROCESSORS = 1
SET_SPARSE, SET_ALL = 0, 1
VECTOR_LOW, VECTOR_HIGH = 0x10, 0xFF


class HvInput(NamedTuple):
    """The input word, taken apart. Source: TLFS 3.7; viridian.c, union hypercall_input."""

    code: int
    fast: bool
    rep_count: int
    first_gpa: int
    second_gpa: int


class HvContext(NamedTuple):
    """Who calls, and what with."""

    machine: Machine
    domain: Domain
    vcpu: Vcpu
    input: HvInput


T = TypeVar("T", bound=Layout)

Answer = tuple[HvStatus, int]
"""Status and how many repetitions are complete."""

INVALID: Answer = (HvStatus.INVALID_PARAMETER, 0)


def take(machine: Machine, domain: Domain, gpa: int, length_bytes: int) -> bytes | None:
    """Copy parameters from guest-physical memory; None where any of it is not there."""
    if gpa + length_bytes > 1 << 64:
        return None
    pieces = []
    for start, count in split_pages(gpa, length_bytes):
        spa = page_of(machine, domain, start >> PAGE_SHIFT)
        if spa is None:
            return None
        pieces.append(fetch(machine, spa + (start & PAGE_MASK), count))
    return b"".join(pieces)


class VpMask:
    """A set of virtual processors, as large as a domain can be; it refuses to be written past its end."""

    __slots__ = ("_words",)

    def __init__(self) -> None:
        self._words = CheckedBuffer(MASK_BANKS * BANK_BYTES)
        self._words.write(0, bytes(MASK_BANKS * BANK_BYTES))

    def put(self, bank: int, bits: int) -> None:
        """Set the 64 processors of `bank`."""
        self._words.write_uint(bank * BANK_BYTES, BANK_BYTES, bits)

    def fill(self) -> None:
        """Set all."""
        self._words.write(0, b"\xff" * (MASK_BANKS * BANK_BYTES))

    def __contains__(self, vp: int) -> bool:
        return bool(self._words.read_uint(vp // VPS_PER_BANK * BANK_BYTES, BANK_BYTES) >> vp % VPS_PER_BANK & 1)


def one_bank(bits: int) -> VpMask:
    """The processors 0 to 63 of a plain mask."""
    mask = VpMask()
    mask.put(0, bits)
    return mask


def all_processors() -> VpMask:
    """Every processor that a domain can have."""
    mask = VpMask()
    mask.fill()
    return mask


def sparse_set(context: HvContext, valid_banks: int, gpa: int) -> VpMask | None:
    """The processors of a sparse set whose banks lie at `gpa`: bank n holds those from 64 n, and only banks with their
    bit set in `valid_banks` are there. Banks that no domain can have are skipped. None when they cannot be read.
    """
    data = take(context.machine, context.domain, gpa, valid_banks.bit_count() * BANK_BYTES)
    if data is None:
        return None
    contents = BankContents.from_bytes(data.ljust(BankContents.SIZE, b"\0")).bank
    mask = VpMask()
    taken = 0
    for bank in range(VPS_PER_BANK):
        if valid_banks >> bank & 1:
            if bank < MASK_BANKS:
                mask.put(bank, contents[taken])
            taken += 1
    return mask


def _read(context: HvContext, layout: type[T]) -> T | None:
    data = take(context.machine, context.domain, context.input.first_gpa, layout.SIZE)
    return None if data is None else layout.from_bytes(data)


def flush(context: HvContext) -> Answer:
    """HvFlushVirtualAddressSpace and List: translations of the model are dropped for all."""
    if context.input.fast or _read(context, HvFlush) is None:
        return INVALID
    context.machine.access.forget()
    return HvStatus.SUCCESS, context.input.rep_count


def flush_ex(context: HvContext) -> Answer:
    """The same with a sparse set."""
    if context.input.fast:
        return INVALID
    parameters = _read(context, HvFlushEx)
    if parameters is None:
        return INVALID
    if not parameters.flags & FLUSH_ALL_PROCESSORS and parameters.set_format != SET_ALL:
        if parameters.set_format != SET_SPARSE:
            return INVALID
        banks_gpa = context.input.first_gpa + HvFlushEx.SIZE
        if sparse_set(context, parameters.valid_bank_mask, banks_gpa) is None:
            return INVALID
    context.machine.access.forget()
    return HvStatus.SUCCESS, context.input.rep_count


def send(context: HvContext, vector: int, mask: VpMask) -> None:
    """Raise `vector` at every processor of `mask` that the domain has and whose APIC is on."""
    board = io.devices(context.machine, context.vcpu)
    for vcpu in context.domain.vcpus:
        if vcpu.index in mask and board.lapics[vcpu.vcpu_id].accept(vector):
            io.wake(context.machine, context.machine.vcpus[vcpu.vcpu_id])


def send_ipi(context: HvContext) -> Answer:
    """HvSendSyntheticClusterIpi: parameters in registers or memory."""
    if context.input.fast:
        if context.input.first_gpa >> 32:
            return INVALID
        vector, mask = context.input.first_gpa, context.input.second_gpa
    else:
        parameters = _read(context, HvSendIpi)
        if parameters is None or parameters.target_vtl or any(parameters.reserved_zero):
            return INVALID
        vector, mask = parameters.vector, parameters.vcpu_mask
    if not VECTOR_LOW <= vector <= VECTOR_HIGH:
        return INVALID
    send(context, vector, one_bank(mask))
    return HvStatus.SUCCESS, 0


def send_ipi_ex(context: HvContext) -> Answer:
    """The same with a sparse set."""
    if context.input.fast:
        return INVALID
    parameters = _read(context, HvSendIpiEx)
    if parameters is None or parameters.target_vtl or any(parameters.reserved_zero):
        return INVALID
    if not VECTOR_LOW <= parameters.vector <= VECTOR_HIGH:
        return INVALID
    if parameters.set_format == SET_ALL:
        mask: VpMask | None = all_processors()
    elif parameters.set_format == SET_SPARSE:
        mask = sparse_set(context, parameters.valid_bank_mask, context.input.first_gpa + HvSendIpiEx.SIZE)
    else:
        mask = None
    if mask is None:
        return INVALID
    send(context, parameters.vector, mask)
    return HvStatus.SUCCESS, 0


def nothing(context: HvContext) -> Answer:
    """HvNotifyLongSpinWait: a yield."""
    return HvStatus.SUCCESS, 0


def unknown(context: HvContext) -> Answer:
    """A call that Xen does not have."""
    return HvStatus.INVALID_HYPERCALL_CODE, 0


CALLS: dict[int, Callable[[HvContext], Answer]] = {
    HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE: flush,
    HvCall.FLUSH_VIRTUAL_ADDRESS_LIST: flush,
    HvCall.NOTIFY_LONG_SPIN_WAIT: nothing,
    HvCall.SEND_IPI: send_ipi,
    HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE_EX: flush_ex,
    HvCall.FLUSH_VIRTUAL_ADDRESS_LIST_EX: flush_ex,
    HvCall.SEND_IPI_EX: send_ipi_ex,
    HvCall.EXT_CALL_QUERY_CAPABILITIES: unknown,
}
"""Each is in `builder.hypercalls` under HYPERV_FLAG | code."""


REGISTERS: tuple[str, ...] = ("rcx", "rdx", "r8")
"""Input value, GPA of the input, GPA of the output of a 64-bit caller. Source: TLFS, 3.7.1."""


def serve(machine: Machine, vcpu: Vcpu, domain: Domain, frame: HypercallFrame) -> HypercallEnd:
    """Serve a Hyper-V hypercall. In 64-bit code the input is in RCX, RDX, R8 and the result in RAX; in 32-bit code
    they are in pairs: EDX:EAX, EBX:ECX, EDI:ESI and EDX:EAX. Elsewhere nothing happens.
    """
    registers = frame.registers
    if frame.mode is CodeMode.BITS_64:
        names = REGISTERS
        word, first, second = registers.rcx, registers.rdx, registers.r8
    elif frame.mode is CodeMode.BITS_32:
        names = ("rax", "rdx", "rbx", "rcx", "rdi", "rsi")
        word = registers.rdx << 32 | registers.rax
        first = registers.rbx << 32 | registers.rcx
        second = registers.rdi << 32 | registers.rsi
    else:
        return HypercallEnd.COMPLETED
    if frame.missing(*names):
        return HypercallEnd.MISSING_INPUT
    taken = HvInput(word & 0xFFFF, bool(word >> 16 & 1), word >> 32 & 0xFFF, first & MASK64, second & MASK64)
    handler = machine.tables.hypercalls.get(HYPERV_FLAG | taken.code, unknown)
    status, repetitions = handler(HvContext(machine, domain, vcpu, taken))
    output = status | repetitions << 32
    if frame.mode is CodeMode.BITS_64:
        registers.rax = output
    else:
        registers.rax, registers.rdx = output & MASK32, output >> 32
        frame.written.add("rdx")
    frame.written.add("rax")
    machine.emit(Hypercalled(vcpu.vcpu_id, HYPERV_FLAG | taken.code, "hyper-v", output, False))
    return HypercallEnd.COMPLETED
