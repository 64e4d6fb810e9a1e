"""Records of the GHCB boundary."""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.vocabulary import Boundary, Checked, Derived, Input, outcome, step

# Steps: what a guest does -----------------------------------------------------------------------------------------


@step("sev_es.vmgexit", Boundary.GHCB)
class Vmgexit(NamedTuple):
    """The guest stores `page` (0 to 4096 bytes, from the page's start) in its GHCB, sets the MSR, executes VMGEXIT.

    `ghcb_msr`: 64 bits; with bits 11:0 zero it is the GPA of the GHCB, else a request of the MSR protocol.
    """

    vcpu: Input[int]
    ghcb_msr: Input[int]
    page: Input[bytes]


@step("sev_es.vc-setup", Boundary.GHCB)
class GuestSetup(NamedTuple):
    """The reference guest negotiates over the MSR and from now on uses the page at `ghcb_gpa` as its GHCB."""

    vcpu: Input[int]
    ghcb_gpa: Input[int]


@step("sev_es.ap-hold", Boundary.GHCB)
class GuestApHold(NamedTuple):
    """The reference guest lets this application processor wait for its start-up IPI (AP reset hold).

    `jump_table_gpa`: where its code finds the address to go to then, in private memory; 0: it stays where it is.
    """

    vcpu: Input[int]
    jump_table_gpa: Input[int]


@step("sev_es.vc-nmi", Boundary.GHCB)
class NmiInside(NamedTuple):
    """An NMI hits the reference guest's #VC handler: in its next exit, between the request and VMGEXIT.

    The NMI handler does what `exit_code`, `exit_info_1` and `insn` say, as in an `exit` step.
    """

    vcpu: Input[int]
    exit_code: Input[int]
    exit_info_1: Input[int]
    insn: Input[bytes]


# Steps: what a hostile hypervisor does ----------------------------------------------------------------------------


@step("sev_es.forge", Boundary.FAULT)
class ForgeReply(NamedTuple):
    """The hypervisor overwrites `data` at `offset` of the GHCB before the guest looks at its next reply."""

    vcpu: Input[int]
    offset: Input[int]
    data: Input[bytes]


@step("sev_es.forge-msr", Boundary.FAULT)
class ForgeMsr(NamedTuple):
    """The hypervisor puts `value` into the GHCB MSR instead of its next MSR-protocol response."""

    vcpu: Input[int]
    value: Input[int]


# Outcomes ---------------------------------------------------------------------------------------------------------


@outcome("sev_es.vc", Boundary.CPU)
class VcDelivered(NamedTuple):
    """The guest gets #VC (vector 29) with the exit code as error code; the hypervisor sees nothing."""

    vcpu: Derived[int]
    error_code: Checked[int]


@outcome("sev_es.request", Boundary.GHCB)
class GhcbRequest(NamedTuple):
    """What the reference guest shows its hypervisor: the valid bitmap and the fields that it marks valid.

    `fields` pairs a name with a number; `data` is the scratch area as far as the request uses it.
    """

    vcpu: Derived[int]
    exit_code: Checked[int]
    info_1: Checked[int]
    info_2: Checked[int]
    valid: Checked[bytes]
    fields: Checked[tuple[tuple[str, int], ...]]
    data: Checked[bytes]


@outcome("sev_es.reply", Boundary.GHCB)
class GhcbReply(NamedTuple):
    """What the hypervisor put into the GHCB; a register that `valid` does not mark is 0 here.

    `valid` is the 16-byte bitmap, `data` what was written to the scratch area.
    """

    vcpu: Derived[int]
    exit_code: Derived[int]
    info_1: Checked[int]
    info_2: Checked[int]
    rax: Checked[int]
    rbx: Checked[int]
    rcx: Checked[int]
    rdx: Checked[int]
    valid: Checked[bytes]
    data: Checked[bytes]


@outcome("sev_es.msr", Boundary.GHCB)
class MsrReply(NamedTuple):
    """The GHCB MSR after a request of the MSR protocol."""

    vcpu: Derived[int]
    request: Derived[int]
    value: Checked[int]


@outcome("sev_es.ignored", Boundary.GHCB)
class VmgexitIgnored(NamedTuple):
    """The hypervisor logged a VMGEXIT and entered the guest again without an answer."""

    vcpu: Derived[int]
    reason: Checked[str]


@outcome("sev_es.terminated", Boundary.GHCB)
class Terminated(NamedTuple):
    """The guest asked for its end: reason set and code, and the GHCB MSR as the hypervisor reports it."""

    vcpu: Derived[int]
    reason_set: Checked[int]
    reason_code: Checked[int]
    ghcb_msr: Checked[int]


@outcome("sev_es.guest-fault", Boundary.CPU)
class GuestFault(NamedTuple):
    """The #VC handler ends an event with an exception for the code that raised it."""

    vcpu: Derived[int]
    vector: Checked[int]
    error_code: Checked[int]


@outcome("sev_es.guest-failed", Boundary.CPU)
class GuestFailed(NamedTuple):
    """The #VC handler cannot go on (a panic, or a signal for user space): `reason` in the words of the model."""

    vcpu: Derived[int]
    reason: Checked[str]


@outcome("sev_es.order", Boundary.GHCB)
class OrderWarning(NamedTuple):
    """The conversation broke a rule of legal order; nothing else happens."""

    vcpu: Derived[int]
    rule: Checked[str]
    message: Checked[str]


RECORDS: tuple[type, ...] = (
    Vmgexit,
    GuestSetup,
    GuestApHold,
    NmiInside,
    ForgeReply,
    ForgeMsr,
    VcDelivered,
    GhcbRequest,
    GhcbReply,
    MsrReply,
    VmgexitIgnored,
    Terminated,
    GuestFault,
    GuestFailed,
    OrderWarning,
)
