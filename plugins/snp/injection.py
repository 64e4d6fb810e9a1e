"""Who injects events into an SNP guest: the hypervisor only #HV (restricted), or a more privileged VMPL (alternate).

With alternate injection EVENTINJ and the virtual interrupt of the VMCB mean nothing; those of the save area count,
which only software of the guest can write.
Source: 24593, 15.36.15 and 15.36.16, 15.20 and 15.21 (events and virtual interrupts), appendix B (save area).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sevlab.core.cpu import EVENT_TYPES, EVENTS_NOT_EXCEPTIONS
from sevlab.core.layout import Layout, bits, flag, u64
from sevlab.core.svm import EVENT_VALID, EventType, ExitCode, Vector, event
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins.sev_es import Vmsa
from sevlab.plugins.snp.states import SnpVcpu, snp_state

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

    InjectFilter = Callable[[Machine, Vcpu, int], int]

RESTRICTED_INJECTION = 1 << 3
ALTERNATE_INJECTION = 1 << 4
"""Of SEV_FEATURES."""
RFLAGS_IF = 1 << 9
SOURCE = "24593, appendix B, VINTR_CTRL; coconut-svsm cpuarch/src/vmsa.rs"


class VintrCtrl(Layout, size=8):
    """VINTR_CTRL of a save area."""

    v_tpr = bits(0, u64, 7, 0, source=SOURCE)
    v_irq = flag(0, u64, 8, source=SOURCE)
    vgif = flag(0, u64, 9, source=SOURCE)
    int_shadow = flag(0, u64, 10, source=SOURCE)
    v_nmi = flag(0, u64, 11, source=SOURCE)
    v_nmi_mask = flag(0, u64, 12, source=SOURCE)
    v_intr_prio = bits(0, u64, 19, 16, source=SOURCE)
    v_ign_tpr = flag(0, u64, 20, source=SOURCE)
    v_nmi_enable = flag(0, u64, 26, source=SOURCE)
    v_intr_vector = bits(0, u64, 39, 32, source=SOURCE)
    busy = flag(0, u64, 63, source=SOURCE)


def check_injection(vcpu: Vcpu, features: int) -> int | None:
    """With restricted injection the hypervisor may inject nothing but #HV: else VMRUN fails. UNVERIFIED.

    Source: 24593, 15.36.16.
    """
    word = vcpu.vmcb.event_inj
    if not features & RESTRICTED_INJECTION or not word & EVENT_VALID:
        return None
    is_hv = word >> 8 & 7 == EventType.EXCEPTION and word & 0xFF == Vector.HV
    return None if is_hv else ExitCode.INVALID


def make_inject_filter(before: InjectFilter) -> InjectFilter:
    """With alternate injection EVENTINJ of the VMCB means nothing: events come by the save area. UNVERIFIED.

    Source: 24593, 15.36.15.
    """

    def inject_filter(machine: Machine, vcpu: Vcpu, word: int) -> int:
        known = snp_state(machine).vcpus.get(vcpu.vcpu_id)
        if known is not None and known.sev_features & ALTERNATE_INJECTION:
            return 0
        return before(machine, vcpu, word)

    return inject_filter


def take_event(machine: Machine, vcpu: Vcpu, known: SnpVcpu) -> int | None:
    """The event that VMRUN takes from the save area, 0: none; None: an illegal one, VMRUN fails.

    What is taken is gone from the save area; what cannot be taken now waits there. Source: 24593, 15.36.15.
    """
    spa, key = vcpu.vmcb.vmsa_pa, machine.access.key_of(vcpu.asid, c_bit=True)
    area = Vmsa.from_bytes(machine.memory.read(spa, PAGE_BYTES, key))
    control = VintrCtrl.from_bytes(area.vintr_ctrl.to_bytes(8, "little"))
    word = area.event_inj
    if word & EVENT_VALID:
        if not _is_legal(word):
            return None
        area = area.replace(event_inj=0)
    else:
        word, after = _virtual(control, interrupts=bool(area.rflags & RFLAGS_IF))
        area = area.replace(vintr_ctrl=int.from_bytes(after.to_bytes(), "little"))
        control = after
    known.event_waits = bool(control.v_irq or (control.v_nmi and control.v_nmi_enable))
    if word:
        machine.memory.write(spa, area.to_bytes(), key, vcpu.tag)
    return word


def _is_legal(word: int) -> bool:
    """As EVENTINJ of the VMCB is checked. Source: 24593, 15.20."""
    kind = word >> 8 & 7
    return kind in EVENT_TYPES and not (kind == EventType.EXCEPTION and word & 0xFF in EVENTS_NOT_EXCEPTIONS)


def _virtual(control: VintrCtrl, *, interrupts: bool) -> tuple[int, VintrCtrl]:
    """A virtual NMI or interrupt that the guest can take now, and the word without it.

    An NMI masks the next; an interrupt needs a priority above V_TPR, or V_IGN_TPR. Source: 24593, 15.21 and 15.21.10.
    """
    if control.v_nmi and control.v_nmi_enable and not control.v_nmi_mask:
        return event(Vector.NMI, EventType.NMI), control.replace(v_nmi=0, v_nmi_mask=1)
    above = control.v_ign_tpr or control.v_intr_prio > control.v_tpr & 0xF
    if control.v_irq and interrupts and not control.int_shadow and above:
        return event(control.v_intr_vector, EventType.INTERRUPT), control.replace(v_irq=0)
    return 0, control
