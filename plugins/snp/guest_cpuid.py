"""The reference guest's CPUID: answered from the CPUID page that the firmware has checked, not by the hypervisor.

The hypervisor still says what only it can know: APIC ids and topology. A function that the table has not is all zero.
Source: Linux arch/x86/coco/sev and arch/x86/boot/startup/sev-shared.c (snp_cpuid, snp_cpuid_postprocess,
snp_cpuid_calc_xsave_size, setup_cpuid_table).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import NamedTuple

from sevlab.core.svm import ExitCode
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins.sev_es import (
    CR4_OSXSAVE,
    INDEXED_LEAVES,
    GuestReply,
    MsrExit,
    MsrInfo,
    Outcome,
    PageExit,
    VcContext,
    VcEnd,
    VcHandler,
    VcInsn,
    VcResult,
    call,
    msr_layout,
)
from sevlab.plugins.snp.guest_pages import CPUID_ENTRIES_MAX, CpuidEntry, CpuidHeader
from sevlab.plugins.snp.guest_protocol import Termination, terminate

CR4_PKE = 1 << 22
REGISTERS = ("rax", "rbx", "rcx", "rdx")
RANGES = (0, 0x4000_0000, 0x8000_0000)
"""Where functions begin; EAX of the first one is the last of its range."""

APIC_ID = 0xFF00_0000
APIC, OSXSAVE, OSPKE = 1 << 9, 1 << 27, 1 << 4
XSAVEC, XSAVES = 1 << 1, 1 << 3
XSAVE_LEGACY_BYTES = 0x240
SVSM_PRESENT = 1 << 28

Exits = Generator[PageExit | MsrExit, "GuestReply | int", "Leaf"]


class Leaf(NamedTuple):
    """What CPUID leaves in four registers."""

    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0


class NoValidAnswer(Exception):  # the way out of a look-up, caught in `cpuid_from`
    """The table cannot answer: a state that is not valid for an SNP guest."""


def table_of(page: bytes) -> tuple[CpuidEntry, ...]:
    """The entries of a CPUID page; none: its count is not 1 to 64, so that the guest must not use it."""
    count = CpuidHeader.from_bytes(page[: CpuidHeader.SIZE]).count
    if not 0 < count <= CPUID_ENTRIES_MAX or len(page) != PAGE_BYTES:
        return ()
    first, size = CpuidHeader.SIZE, CpuidEntry.SIZE
    return tuple(CpuidEntry.from_bytes(page[first + n * size : first + (n + 1) * size]) for n in range(count))


def find(table: tuple[CpuidEntry, ...], leaf: int, subleaf: int) -> Leaf | None:
    """The table's answer. Of function 0Dh only the rows for the smallest area count: what is enabled is computed."""
    for entry in table:
        if entry.eax_in != leaf or (leaf in INDEXED_LEAVES and entry.ecx_in != subleaf):
            continue
        if leaf == 0xD and subleaf < 2 and (entry.xcr0_in not in (1, 3) or entry.xss_in):
            continue
        return Leaf(entry.eax, entry.ebx, entry.ecx, entry.edx)
    return None


def in_range(table: tuple[CpuidEntry, ...], leaf: int) -> bool:
    """Whether the function lies in a range that the table announces."""
    for first in RANGES:
        head = find(table, first, 0)
        if first <= leaf <= (head.eax if head is not None else 0):
            return True
    return False


def xsave_bytes(table: tuple[CpuidEntry, ...], features: int, *, compacted: bool) -> int:
    """The size of the XSAVE area with these features. Raises `NoValidAnswer` for a feature that the table has not."""
    size, found = XSAVE_LEGACY_BYTES, 0
    for entry in table:
        bit = 1 << entry.ecx_in if entry.eax_in == 0xD and 1 < entry.ecx_in < 64 else 0
        if not features & bit & ~found:
            continue
        found |= bit
        size = size + entry.eax if compacted else max(size, entry.eax + entry.ebx)
    if found != features & ~0b11:
        raise NoValidAnswer
    return size


def ask(context: VcContext, leaf: int, subleaf: int) -> Exits:
    """The hypervisor's answer, by the page where there is one; any other answer ends the guest.

    By the MSR there are no subfunctions. Source: Linux sev-shared.c (sev_cpuid_hv_ghcb, sev_cpuid_hv_msr).
    """
    if context.ghcb:
        xcr0 = context.system.xcr0 if context.system.cr4 & CR4_OSXSAVE else 1
        request = PageExit(ExitCode.CPUID, fields={"rax": leaf, "rcx": subleaf, "xcr0": xcr0})
        try:
            reply = yield from call(context, request, *REGISTERS)
        except VcEnd:
            return (yield from _end())
        return Leaf(*(reply.registers[name] & 0xFFFF_FFFF for name in REGISTERS))
    values = []
    for register in range(4):
        answer = yield MsrExit(
            msr_layout.build(msr_layout.CpuidRequest, MsrInfo.CPUID_REQUEST, register=register, function=leaf)
        )
        if not isinstance(answer, int) or answer & msr_layout.INFO_MASK != MsrInfo.CPUID_RESPONSE:
            return (yield from _end())
        values.append(answer >> 32)
    return Leaf(*values)


def _end() -> Exits:
    raise VcEnd((yield from terminate(Termination.CPUID_HV, "CPUID: the hypervisor gives no answer")))


def _apic(context: VcContext, leaf: int, subleaf: int, own: Leaf, _table: tuple[CpuidEntry, ...]) -> Exits:
    """Function 1: the initial APIC id and whether there is an APIC come from the hypervisor, OSXSAVE from CR4."""
    theirs = yield from ask(context, leaf, subleaf)
    return Leaf(
        own.eax,
        theirs.ebx & APIC_ID | own.ebx & ~APIC_ID,
        own.ecx | (OSXSAVE if context.system.cr4 & CR4_OSXSAVE else 0),
        theirs.edx & APIC | own.edx & ~APIC,
    )


def _protection_keys(context: VcContext, _leaf: int, _subleaf: int, own: Leaf, _table: tuple[CpuidEntry, ...]) -> Exits:
    """Function 7: OSPKE is what the guest's own CR4 says."""
    return own._replace(ecx=own.ecx & ~OSPKE | (OSPKE if context.system.cr4 & CR4_PKE else 0))
    yield  # as all of them, a generator


def _x2apic_id(context: VcContext, leaf: int, _subleaf: int, own: Leaf, _table: tuple[CpuidEntry, ...]) -> Exits:
    """Function 0Bh: the x2APIC id."""
    theirs = yield from ask(context, leaf, 0)
    return own._replace(edx=theirs.edx)


def _xsave(context: VcContext, _leaf: int, subleaf: int, own: Leaf, table: tuple[CpuidEntry, ...]) -> Exits:
    """Function 0Dh: the size for what is enabled now, from the sizes of the features in the table."""
    if subleaf > 1:
        return own
    features = context.system.xcr0 if context.system.cr4 & CR4_OSXSAVE else 1
    if subleaf:
        if not own.eax & (XSAVEC | XSAVES):
            raise NoValidAnswer
        features |= context.system.xss if own.eax & XSAVES else 0
    return own._replace(ebx=xsave_bytes(table, features, compacted=bool(subleaf)))
    yield  # as all of them, a generator


def _topology(context: VcContext, leaf: int, subleaf: int, own: Leaf, _table: tuple[CpuidEntry, ...]) -> Exits:
    """Function 8000001Eh: extended APIC id, compute unit and node."""
    theirs = yield from ask(context, leaf, subleaf)
    return Leaf(
        theirs.eax, theirs.ebx & 0xFF | own.ebx & 0xFFFF_FF00, theirs.ecx & 0xFF | own.ecx & 0xFFFF_FF00, own.edx
    )


def _svsm(context: VcContext, _leaf: int, _subleaf: int, own: Leaf, _table: tuple[CpuidEntry, ...]) -> Exits:
    """Function 8000001Fh: above VMPL0 there is an SVSM."""
    return own._replace(eax=own.eax | (SVSM_PRESENT if context.vmpl else 0))
    yield  # as all of them, a generator


PATCHES: dict[int, Callable[[VcContext, int, int, Leaf, tuple[CpuidEntry, ...]], Exits]] = {
    0x1: _apic,
    0x7: _protection_keys,
    0xB: _x2apic_id,
    0xD: _xsave,
    0x8000_001E: _topology,
    0x8000_001F: _svsm,
}
"""What is not in the table. Source: Linux sev-shared.c (snp_cpuid_postprocess)."""


def make_cpuid(before: Callable[[VcContext, VcInsn], VcHandler]) -> Callable[[VcContext, VcInsn], VcHandler]:
    """The #VC handler of CPUID: from the table, where the guest has one; else as before."""

    def cpuid(context: VcContext, insn: VcInsn) -> VcHandler:
        if not context.cpuid_page:
            return (yield from before(context, insn))
        table = table_of(context.cpuid_page)
        regs = context.regs
        leaf, subleaf = regs.rax & 0xFFFF_FFFF, regs.rcx & 0xFFFF_FFFF
        own = find(table, leaf, subleaf)
        answer = own or Leaf()
        if own is not None or in_range(table, leaf):
            patch = PATCHES.get(leaf)
            try:
                answer = answer if patch is None else (yield from patch(context, leaf, subleaf, answer, table))
            except NoValidAnswer:
                outcome = Outcome.VMM_ERROR if context.ghcb else Outcome.TERMINATE
                return VcResult(outcome, reason=f"CPUID {leaf:#x}, {subleaf:#x}: the table has no valid answer")
        regs.rax, regs.rbx, regs.rcx, regs.rdx = answer
        return VcResult(Outcome.DONE, insn.length)

    return cpuid
