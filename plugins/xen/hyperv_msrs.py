"""Hyper-V's synthetic MSRs as Xen offers them. Those of the synthetic interrupt controller and its timers are not
offered, as libxl leaves them: they are #GP like every other number of the group.

Source: Xen xen/arch/x86/hvm/viridian/{viridian,synic,time}.c (guest_wrmsr_viridian, guest_rdmsr_viridian and what they
call); tools/libs/light/libxl_x86.c (hvm_set_viridian_features); numbers: asm/guest/hyperv-tlfs.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.builder import Msr
from sevlab.core.determinism import TSC_HZ
from sevlab.core.events import Fault
from sevlab.core.svm import Vector
from sevlab.core.units import MASK32, MASK64, PAGE_BYTES, PAGE_SHIFT
from sevlab.plugins import io
from sevlab.plugins.xen.arguments.hyperv import HvReferenceTsc
from sevlab.plugins.xen.frames import page_of, store
from sevlab.plugins.xen.numbers import SHUTDOWN_REASONS
from sevlab.plugins.xen.state import Domain, XenVcpu, domain_of

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

GP = Fault(Vector.GP, 0, 0)
GUEST_OS_ID, HYPERCALL, VP_INDEX = 0x4000_0000, 0x4000_0001, 0x4000_0002
TIME_REF_COUNT, REFERENCE_TSC, TSC_FREQUENCY, APIC_FREQUENCY = 0x4000_0020, 0x4000_0021, 0x4000_0022, 0x4000_0023
EOI, ICR, TPR, VP_ASSIST_PAGE = 0x4000_0070, 0x4000_0071, 0x4000_0072, 0x4000_0073
CRASH_P0, CRASH_PARAMETERS, CRASH_CTL = 0x4000_0100, 5, 0x4000_0105
ENABLED = 1
"""Bit 0 of an MSR that names a page."""
CRASH_NOTIFY = 1 << 63
STUB = bytes.fromhex("0d00000080 0f01d9 c3")
"""`or eax, 80000000h`, which tells Hyper-V's calls from Xen's, `vmmcall`, `ret`."""
APIC_BUS_HZ = 1_000_000_000
"""The rate of the APIC's timer in this model; in Xen it is 100 MHz (asm/hvm/vlapic.h, APIC_BUS_CYCLE_NS)."""
TSC_SCALE = ((10_000 << 32) // (TSC_HZ // 1000)) << 32
"""100-ns units of a tick, times 2^64, as precise as Xen makes it."""
APIC_TPR, APIC_EOI, APIC_ICR_LOW, APIC_ICR_HIGH = 0x80, 0xB0, 0x300, 0x310


class Context(NamedTuple):
    """Whose MSR it is."""

    machine: Machine
    domain: Domain
    me: XenVcpu
    vcpu: Vcpu


Read = Callable[[Context], int]
Write = Callable[[Context, int], None]


# Pages ------------------------------------------------------------------------------------------------------------


def _page(context: Context, value: int) -> int | None:
    """SPA of the page that an MSR names; None where it is off or no page of the guest's: that is no fault."""
    return page_of(context.machine, context.domain, value >> PAGE_SHIFT) if value & ENABLED else None


def write_hypercall(context: Context, value: int) -> None:
    """With bit 0 the page is filled, each time; one that cannot be written stays as it is."""
    context.domain.hyperv_hypercall = value
    spa = _page(context, value)
    if spa is not None:
        store(context.machine, spa, STUB.ljust(PAGE_BYTES, b"\xcc"))


def write_reference_tsc(context: Context, value: int) -> None:
    """With bit 0 the page gets the scale of the time-stamp counter; the counter's offset is 0 as long as no domain
    is migrated.
    """
    context.domain.hyperv_reference_tsc = value
    spa = _page(context, value)
    if spa is not None:
        head = HvReferenceTsc.build(tsc_sequence=1, tsc_scale=TSC_SCALE, tsc_offset=0)
        store(context.machine, spa, head.ljust(PAGE_BYTES, b"\0"))


def time_ref_count(context: Context) -> int:
    """100-ns units since the domain began."""
    return (context.machine.tsc() * TSC_SCALE >> 64) & MASK64


# APIC -------------------------------------------------------------------------------------------------------------


def _apic_write(context: Context, offset: int, value: int) -> None:
    """A register of the local APIC at its window; where it has none (x2APIC mode) nothing happens."""
    apic = io.devices(context.machine, context.vcpu).lapics[context.vcpu.vcpu_id]
    if apic.mapped:
        io.mmio_write(context.machine, context.vcpu, (apic.base & -PAGE_BYTES) + offset, 4, value & MASK32)


def _apic_read(context: Context, offset: int) -> int:
    apic = io.devices(context.machine, context.vcpu).lapics[context.vcpu.vcpu_id]
    return apic.read(offset, context.machine.tsc()) & MASK32


def write_icr(context: Context, value: int) -> None:
    """Destination first: the low half sends."""
    _apic_write(context, APIC_ICR_HIGH, value >> 32)
    _apic_write(context, APIC_ICR_LOW, value)


# Others -----------------------------------------------------------------------------------------------------------


def _store_os_id(context: Context, value: int) -> None:
    context.domain.hyperv_os_id = value


def _store_assist(context: Context, value: int) -> None:
    """The page is named only: an EOI is never saved through it, as Xen may choose."""
    context.me.hyperv_assist = value


def _crash(context: Context, value: int) -> None:
    """With bit 63 the domain's end, when it comes, is a crash."""
    if value & CRASH_NOTIFY:
        context.domain.shutdown_code = SHUTDOWN_REASONS.index("crash")


def _crash_parameter(index: int) -> tuple[Read, Write]:
    def write(context: Context, value: int) -> None:
        words = list(context.me.hyperv_crash)
        words[index] = value
        context.me.hyperv_crash = (words[0], words[1], words[2], words[3], words[4])

    return lambda context: context.me.hyperv_crash[index], write


def _dropped(_context: Context, _value: int) -> None:
    """A write that is allowed and does nothing."""


MSRS: dict[int, tuple[Read | None, Write | None]] = {
    GUEST_OS_ID: (lambda c: c.domain.hyperv_os_id, _store_os_id),
    HYPERCALL: (lambda c: c.domain.hyperv_hypercall, write_hypercall),
    VP_INDEX: (lambda c: c.me.index, _dropped),
    TIME_REF_COUNT: (time_ref_count, None),
    REFERENCE_TSC: (lambda c: c.domain.hyperv_reference_tsc, write_reference_tsc),
    TSC_FREQUENCY: (lambda _c: TSC_HZ // 1000 * 1000, None),
    APIC_FREQUENCY: (lambda _c: APIC_BUS_HZ, None),
    EOI: (None, lambda c, value: _apic_write(c, APIC_EOI, value)),
    ICR: (lambda c: _apic_read(c, APIC_ICR_HIGH) << 32 | _apic_read(c, APIC_ICR_LOW), write_icr),
    TPR: (lambda c: _apic_read(c, APIC_TPR), lambda c, value: _apic_write(c, APIC_TPR, value)),
    VP_ASSIST_PAGE: (lambda c: c.me.hyperv_assist, _store_assist),
    **{CRASH_P0 + index: _crash_parameter(index) for index in range(CRASH_PARAMETERS)},
    CRASH_CTL: (lambda _c: CRASH_NOTIFY, _crash),
}
"""What reads and writes a register; None: #GP."""


def _context(machine: Machine, vcpu: Vcpu | None) -> Context | None:
    domain = None if vcpu is None else domain_of(machine, vcpu)
    if domain is None or vcpu is None:
        return None
    return Context(machine, domain, domain.vcpus[vcpu.vcpu_id - domain.vcpus[0].vcpu_id], vcpu)


def _read(machine: Machine, vcpu: Vcpu | None, number: int) -> int | Fault:
    context, read = _context(machine, vcpu), MSRS[number][0]
    return GP if context is None or read is None else read(context)


def _write(machine: Machine, vcpu: Vcpu | None, number: int, value: int) -> Fault | None:
    context, write = _context(machine, vcpu), MSRS[number][1]
    if context is None or write is None:
        return GP
    write(context, value)
    return None


def register(builder: PluginBuilder) -> None:
    """Put them into the machine."""
    for number in MSRS:
        builder.guest_msrs.add(number, Msr(_read, _write))
