"""Records of the hypercall boundary."""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.vocabulary import Boundary, Checked, Derived, Input, outcome, step


@step("xen.call", Boundary.HYPERCALL)
class HypercallStep(NamedTuple):
    """A guest puts `number` and the arguments into the registers of its ABI and executes VMMCALL, again while the call
    is preempted. FastABI takes seven arguments, the others five.
    """

    vcpu: Input[int]
    number: Input[int]
    a1: Input[int]
    a2: Input[int]
    a3: Input[int]
    a4: Input[int]
    a5: Input[int]
    a6: Input[int]
    a7: Input[int]


@outcome("xen.called", Boundary.HYPERCALL)
class Hypercalled(NamedTuple):
    """Xen served a hypercall: `result` as 64 bits, or the call was preempted and the guest will repeat it."""

    vcpu: Derived[int]
    number: Checked[int]
    abi: Checked[str]
    result: Checked[int]
    preempted: Checked[bool]


@outcome("xen.hypercall-page", Boundary.HYPERCALL)
class HypercallPage(NamedTuple):
    """Xen filled a page of the guest's with its stubs."""

    vcpu: Derived[int]
    gpa: Checked[int]


@outcome("xen.adapted", Boundary.HYPERCALL)
class Adapted(NamedTuple):
    """With the option `adapt`: what Xen could not have done for this encrypted guest was done through the guest's own
    eyes, as if its kernel had been adapted; `what` is `buffer` (at a linear address) or `hypercall page` (at a GPA).
    """

    vcpu: Derived[int]
    what: Checked[str]
    address: Checked[int]


@outcome("xen.upcall", Boundary.HYPERCALL)
class Upcall(NamedTuple):
    """An event became visible to a vCPU: its upcall flag went from 0 to 1."""

    vcpu: Checked[int]


@outcome("xen.traced", Boundary.HYPERCALL)
class Traced(NamedTuple):
    """A guest put an event of its own into Xen's trace."""

    vcpu: Checked[int]
    event: Checked[int]
    data: Checked[bytes]


@step("xen.console", Boundary.DEVICE)
class ConsoleInput(NamedTuple):
    """Somebody types: the backend takes what the domain wrote, puts the bytes into its ring, and notifies it."""

    domid: Input[int]
    data: Input[bytes]


@outcome("xen.console-output", Boundary.DEVICE)
class ConsoleOutput(NamedTuple):
    """What the backend found in a domain's console ring."""

    domid: Derived[int]
    data: Checked[bytes]


@step("xen.xenstore", Boundary.DEVICE)
class XenstoreRequest(NamedTuple):
    """The control domain's toolstack sends a message to xenstored: `kind` is its type, as in xs_wire.h."""

    kind: Input[int]
    payload: Input[bytes]
    tx_id: Input[int]


@outcome("xen.xenstore-reply", Boundary.DEVICE)
class XenstoreReply(NamedTuple):
    """What xenstored answered: the same type, or 16 (ERROR) with an error's name."""

    kind: Checked[int]
    payload: Checked[bytes]


@step("xen.backend", Boundary.SCHEDULER)
class BackendEvent(NamedTuple):
    """A device model or another part of Xen raises a domain's VIRQ, GSI or PIRQ: `kind` is one of these words."""

    domid: Input[int]
    kind: Input[str]
    number: Input[int]
    vcpu: Input[int]


RECORDS = (
    HypercallStep,
    Hypercalled,
    HypercallPage,
    Adapted,
    Upcall,
    Traced,
    ConsoleInput,
    ConsoleOutput,
    XenstoreRequest,
    XenstoreReply,
    BackendEvent,
)
