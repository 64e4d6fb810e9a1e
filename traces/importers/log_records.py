"""The records of imported logs that no event declares: what lies around the events."""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.vocabulary import Boundary, Checked, Derived, Input, outcome, step
from sevlab.traces.importers import kvm_exits, kvm_host, kvm_interrupts
from sevlab.traces.importers.events import EVENTS

EVENT_MODULES = (kvm_exits, kvm_interrupts, kvm_host)
"""The modules whose import declares the events."""


@step("log.host", Boundary.SCHEDULER)
class HostActivity(NamedTuple):
    """Something happened on the host in thread `thread`, outside any exchange: see the outcome."""

    thread: Input[int]


@outcome("log.exit-event", Boundary.CPU)
class ExitEvent(NamedTuple):
    """What kvm_exit printed beside the step: EXITINTINFO, valid or not, and pending requests."""

    intr_info: Derived[int]
    error_code: Derived[int]
    requests: Derived[tuple[int, ...]]


@outcome("log.entered", Boundary.CPU)
class Entered(NamedTuple):
    """The exchange is over `after_ns` after its exit; without it the log ends in the middle."""

    after_ns: Derived[int]


@outcome("log.event", Boundary.SCHEDULER)
class OpaqueEvent(NamedTuple):
    """An event of a kind or a layout that is not known: its name and its text."""

    name: Derived[str]
    text: Derived[str]


@outcome("log.gap", Boundary.SCHEDULER)
class Gap(NamedTuple):
    """The recorder of CPU `cpu` lost events here: `events` of them, empty when it does not say."""

    cpu: Derived[int]
    events: Derived[tuple[int, ...]]


@outcome("log.xen", Boundary.CPU)
class XenEvent(NamedTuple):
    """A record of xentrace: its event id and its words (Xen xen/include/public/trace.h)."""

    event: Derived[int]
    words: Checked[tuple[int, ...]]


@outcome("log.ghcb-msr", Boundary.GHCB)
class GhcbMsrTraffic(NamedTuple):
    """A VMGEXIT by the MSR protocol: the GHCB MSR before and after."""

    request: Checked[int]
    reply: Input[int]


@outcome("log.ghcb", Boundary.GHCB)
class GhcbPageTraffic(NamedTuple):
    """A VMGEXIT by the page protocol: non-zero qwords that the guest left, by offset, and those that the reply changed.

    Stale fields whose valid bit is clear are among them.
    """

    gpa: Derived[int]
    qwords: Checked[tuple[tuple[int, int], ...]]
    version: Checked[int]
    usage: Checked[int]
    data: Checked[bytes]
    reply: Input[tuple[tuple[int, int], ...]]
    reply_data: Input[bytes]


LOG_RECORDS: tuple[type, ...] = (
    HostActivity,
    ExitEvent,
    Entered,
    OpaqueEvent,
    Gap,
    XenEvent,
    GhcbMsrTraffic,
    GhcbPageTraffic,
    *(event.record for event in EVENTS.values()),
)
"""All record kinds of imported logs; part of the vocabulary of every trace."""
