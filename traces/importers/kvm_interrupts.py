"""KVM: interrupt controllers and injected events.

Source: as in `events`.
"""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.vocabulary import Boundary, Checked, Derived
from sevlab.traces.importers.events import Absent, event


@event(
    "kvm_inj_virq",
    "{soft:one:IRQ|Soft/INTn} {vector:x}{reinjected:is: [reinjected]}",
    "irq {vector:d}",
)
class KvmInjVirq(NamedTuple):
    """An interrupt is injected."""

    vector: Checked[int]
    soft: Derived[bool]
    reinjected: Derived[bool]


@event(
    "kvm_inj_exception",
    "#{vector:vector}< ({error_code:x})>{reinjected:is: [reinjected]}",
    "[FAILED TO PARSE] exception={vector:d} has_error=1< error_code={error_code:d}> reinjected={reinjected:one:0|1}",
    "[FAILED TO PARSE] exception={vector:d} has_error=0 error_code=0 reinjected={reinjected:one:0|1}",
)
class KvmInjException(NamedTuple):
    """An exception is injected."""

    vector: Checked[int]
    error_code: Derived[Absent]
    reinjected: Derived[bool]


@event("kvm_apic", "apic_{write:one:read|write} {register:apicreg} = {value:x}", boundary=Boundary.DEVICE)
class KvmApic(NamedTuple):
    """An access to the local APIC's registers."""

    write: Derived[bool]
    register: Checked[int]
    value: Checked[int]


@event(
    "kvm_apic_ipi",
    (
        "dst {destination:x} vec {vector:d}"
        " ({mode:delivery}|{logical:one:physical|logical}|{asserted:one:de-assert|assert}|{level:one:edge|lev"
        "el}|{shorthand:shorthand})"
    ),
    boundary=Boundary.DEVICE,
)
class KvmApicIpi(NamedTuple):
    """The interrupt command register takes effect."""

    destination: Checked[int]
    vector: Checked[int]
    mode: Checked[int]
    logical: Checked[bool]
    asserted: Checked[bool]
    level: Checked[bool]
    shorthand: Checked[int]


@event(
    "kvm_apic_accept_irq",
    "apicid {apic_id:x} vec {vector:d} ({mode:delivery}|{level:one:edge|level})",
    boundary=Boundary.DEVICE,
)
class KvmApicAcceptIrq(NamedTuple):
    """A local APIC takes an interrupt message."""

    apic_id: Derived[int]
    vector: Derived[int]
    mode: Derived[int]
    level: Derived[bool]


@event(
    "kvm_apicv_accept_irq",
    "apicid {apic_id:x} vec {vector:d} ({mode:delivery}|{level:one:edge|level})",
    boundary=Boundary.DEVICE,
)
class KvmApicvAcceptIrq(NamedTuple):
    """The same through hardware."""

    apic_id: Derived[int]
    vector: Derived[int]
    mode: Derived[int]
    level: Derived[bool]


@event("kvm_eoi", "apicid {apic_id:x} vector {vector:d}", boundary=Boundary.DEVICE)
class KvmEoi(NamedTuple):
    """The highest interrupt in service ends."""

    apic_id: Derived[int]
    vector: Checked[int]


@event("kvm_pv_eoi", "apicid {apic_id:x} vector {vector:d}", boundary=Boundary.DEVICE)
class KvmPvEoi(NamedTuple):
    """The guest ended it through shared memory."""

    apic_id: Derived[int]
    vector: Checked[int]


@event(
    "kvm_pic_set_irq",
    "chip {chip:d} pin {pin:d} ({level:one:edge|level}{masked:is:|masked}){coalesced:is: (coalesced)}",
    boundary=Boundary.DEVICE,
)
class KvmPicSetIrq(NamedTuple):
    """An input of a PIC."""

    chip: Derived[int]
    pin: Checked[int]
    level: Derived[bool]
    masked: Derived[bool]
    coalesced: Derived[bool]


@event(
    "kvm_ioapic_set_irq",
    (
        "pin {pin:d} dst {destination:x} vec {vector:d}"
        " ({mode:delivery}|{logical:one:physical|logical}|{level:one:edge|level}{masked:is:|masked}){coalesce"
        "d:is: (coalesced)}"
    ),
    boundary=Boundary.DEVICE,
)
class KvmIoapicSetIrq(NamedTuple):
    """An input of the I/O APIC."""

    pin: Checked[int]
    destination: Derived[int]
    vector: Derived[int]
    mode: Derived[int]
    logical: Derived[bool]
    level: Derived[bool]
    masked: Derived[bool]
    coalesced: Derived[bool]


@event(
    "kvm_ioapic_delayed_eoi_inj",
    (
        "dst {destination:x} vec {vector:d}"
        " ({mode:delivery}|{logical:one:physical|logical}|{level:one:edge|level}{masked:is:|masked})"
    ),
    boundary=Boundary.DEVICE,
)
class KvmIoapicDelayedEoiInj(NamedTuple):
    """A level interrupt is delivered again, delayed."""

    destination: Derived[int]
    vector: Derived[int]
    mode: Derived[int]
    logical: Derived[bool]
    level: Derived[bool]
    masked: Derived[bool]


@event(
    "kvm_msi_set_irq",
    (
        "dst {destination:x} vec {vector:d}"
        " ({mode:delivery}|{logical:one:physical|logical}|{level:one:edge|level}{hint:is:|rh})"
    ),
    boundary=Boundary.DEVICE,
)
class KvmMsiSetIrq(NamedTuple):
    """A message-signalled interrupt."""

    destination: Derived[int]
    vector: Derived[int]
    mode: Derived[int]
    logical: Derived[bool]
    level: Derived[bool]
    hint: Derived[bool]


@event("kvm_set_irq", "gsi {gsi:d} level {level:d} source {source:d}", boundary=Boundary.DEVICE)
class KvmSetIrq(NamedTuple):
    """An interrupt line of the board."""

    gsi: Derived[int]
    level: Derived[int]
    source: Derived[int]


@event("kvm_ack_irq", "irqchip {chip:t} pin {pin:d}", boundary=Boundary.DEVICE)
class KvmAckIrq(NamedTuple):
    """A controller is told that an interrupt was taken or ended."""

    chip: Derived[str]
    pin: Derived[int]


@event(
    "kvm_avic_incomplete_ipi",
    "vcpu={vcpu:d}, icrh:icrl={icr_high:x}:{icr_low:x}, id={id:d}, index={cause:d}",
    boundary=Boundary.DEVICE,
)
class KvmAvicIncompleteIpi(NamedTuple):
    """AVIC could not deliver."""

    vcpu: Derived[int]
    icr_high: Derived[int]
    icr_low: Derived[int]
    id: Derived[int]
    cause: Derived[int]


@event(
    "kvm_avic_unaccelerated_access",
    "vcpu={vcpu:d}, offset={offset:x}({register:w}), {fault:one:trap|fault}, {write:one:read|write}, vec={vector:x}",
    boundary=Boundary.DEVICE,
)
class KvmAvicUnacceleratedAccess(NamedTuple):
    """AVIC could not serve."""

    vcpu: Derived[int]
    offset: Derived[int]
    register: Derived[str]
    fault: Derived[bool]
    write: Derived[bool]
    vector: Derived[int]
