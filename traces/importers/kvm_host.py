"""KVM: the host's own business: clocks, FPU, memory, waiting, user space.

Source: as in `events`.
"""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.vocabulary import Boundary, Derived
from sevlab.traces.importers.events import event


@event("kvm_userspace_exit", "reason {reason:w} ({number:d})")
class KvmUserspaceExit(NamedTuple):
    """The monitor in user space is asked; `number` is KVM_EXIT_, or an errno when `reason` says restart or error."""

    reason: Derived[str]
    number: Derived[int]


@event("kvm_vcpu_wakeup", "{polled:one:wait|poll} time {time_ns:d} ns, polling {valid:one:invalid|valid}")
class KvmVcpuWakeup(NamedTuple):
    """A halted vCPU goes on."""

    polled: Derived[bool]
    time_ns: Derived[int]
    valid: Derived[bool]


@event("kvm_halt_poll_ns", "vcpu {vcpu:d}: halt_poll_ns {new:d} ({grow:one:shrink|grow} {old:d})")
class KvmHaltPollNs(NamedTuple):
    """The time to poll in HLT changes."""

    vcpu: Derived[int]
    new: Derived[int]
    grow: Derived[bool]
    old: Derived[int]


@event("kvm_fpu", "{load:one:unload|load}")
class KvmFpu(NamedTuple):
    """The guest's FPU state."""

    load: Derived[bool]


@event("kvm_write_tsc_offset", "vcpu={vcpu:d} prev={previous:d} next={next:d}")
class KvmWriteTscOffset(NamedTuple):
    """The TSC offset."""

    vcpu: Derived[int]
    previous: Derived[int]
    next: Derived[int]


@event(
    "kvm_pvclock_update",
    (
        "vcpu_id {vcpu:d}, pvclock { version {version:d}, tsc_timestamp {tsc_timestamp:x}, system_time"
        " {system_time:x}, tsc_to_system_mul {multiplier:x}, tsc_shift {shift:byte}, flags {flags:x} }"
    ),
)
class KvmPvclockUpdate(NamedTuple):
    """The guest's clock page."""

    vcpu: Derived[int]
    version: Derived[int]
    tsc_timestamp: Derived[int]
    system_time: Derived[int]
    multiplier: Derived[int]
    shift: Derived[int]
    flags: Derived[int]


@event("kvm_hv_timer_state", "vcpu_id {vcpu:d} hv_timer {used:d}")
class KvmHvTimerState(NamedTuple):
    """Whether the host's timer hardware serves the guest's."""

    vcpu: Derived[int]
    used: Derived[int]


@event("kvm_wait_lapic_expire", "vcpu {vcpu:d}: delta {delta:d} ({late:one:early|late})")
class KvmWaitLapicExpire(NamedTuple):
    """How far a timer was missed."""

    vcpu: Derived[int]
    delta: Derived[int]
    late: Derived[bool]


@event("kvm_pv_tlb_flush", "vcpu {vcpu:d} need_flush_tlb {needed:one:false|true}", boundary=Boundary.MEMORY)
class KvmPvTlbFlush(NamedTuple):
    """A flush that another vCPU asked for."""

    vcpu: Derived[int]
    needed: Derived[bool]


@event("kvm_smm_transition", "vcpu {vcpu:d}: {entering:one:leaving|entering} SMM, smbase {smbase:x}")
class KvmSmmTransition(NamedTuple):
    """System management mode."""

    vcpu: Derived[int]
    entering: Derived[bool]
    smbase: Derived[int]


@event("kvm_apicv_inhibit_changed", "{set:one:cleared|set} reason={reason:d}, inhibits={inhibits:x}{names:t}")
class KvmApicvInhibitChanged(NamedTuple):
    """A reason not to use APIC virtualisation."""

    set: Derived[bool]
    reason: Derived[int]
    inhibits: Derived[int]
    names: Derived[str]


@event("kvm_update_master_clock", "masterclock {master:d} hostclock {clock:clock} offsetmatched {matched:d}")
class KvmUpdateMasterClock(NamedTuple):
    """The VM's clock."""

    master: Derived[int]
    clock: Derived[int]
    matched: Derived[int]


@event(
    "kvm_track_tsc",
    "vcpu_id {vcpu:d} masterclock {master:d} offsetmatched {matched:d} nr_online {online:d} hostclock {clock:clock}",
)
class KvmTrackTsc(NamedTuple):
    """The vCPUs' TSC offsets."""

    vcpu: Derived[int]
    master: Derived[int]
    matched: Derived[int]
    online: Derived[int]
    clock: Derived[int]


@event("kvm_hv_stimer_set_config", "vcpu_id {vcpu:d} timer {timer:d} config {config:x} host {host:d}")
class KvmHvStimerSetConfig(NamedTuple):
    """A Hyper-V timer."""

    vcpu: Derived[int]
    timer: Derived[int]
    config: Derived[int]
    host: Derived[int]


@event("kvm_hv_stimer_set_count", "vcpu_id {vcpu:d} timer {timer:d} count {expiry:d} host {host:d}")
class KvmHvStimerSetCount(NamedTuple):
    """A Hyper-V timer."""

    vcpu: Derived[int]
    timer: Derived[int]
    expiry: Derived[int]
    host: Derived[int]


@event("kvm_hv_stimer_cleanup", "vcpu_id {vcpu:d} timer {timer:d}")
class KvmHvStimerCleanup(NamedTuple):
    """A Hyper-V timer."""

    vcpu: Derived[int]
    timer: Derived[int]


@event("kvm_hv_syndbg_get_msr", "vcpu_id {vcpu:d} vp_index {vp_index:d} msr {number:x} data {value:x}")
class KvmHvSyndbgGetMsr(NamedTuple):
    """A Hyper-V debug register."""

    vcpu: Derived[int]
    vp_index: Derived[int]
    number: Derived[int]
    value: Derived[int]


@event("kvm_async_pf_ready", "token {token:x} gva {gva:x}", boundary=Boundary.MEMORY)
class KvmAsyncPfReady(NamedTuple):
    """A page that was away is there."""

    token: Derived[int]
    gva: Derived[int]


@event("kvm_unmap_hva_range", "mmu notifier unmap range: {start:x} -- {end:x}", boundary=Boundary.MEMORY)
class KvmUnmapHvaRange(NamedTuple):
    """The host takes memory away."""

    start: Derived[int]
    end: Derived[int]


@event("kvm_set_spte_hva", "mmu notifier set pte hva: {address:x}", boundary=Boundary.MEMORY)
class KvmSetSpteHva(NamedTuple):
    """The host moves memory."""

    address: Derived[int]
