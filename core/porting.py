"""What becomes of a plain guest's exit when the guest is encrypted: judgements of features, as plain data.

`sevlab assess` asks every feature. A feature brings a judge, a subject - a machine with a guest under that feature, in
which the exchange that takes the exit's place is executed - or both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sevlab.core.events import GuestExit
    from sevlab.core.machine import Machine


class Path(Enum):
    """How an exit is served under a feature."""

    STAYS = "stays"
    """It leaves the guest as before, and the hypervisor serves it as before."""
    AUTOMATIC = "automatic"
    """Its intercept is removed, or a write trap takes its place: the guest does it alone."""
    NAE = "NAE"
    """The guest gets #VC and asks through the GHCB."""
    CANNOT = "cannot"
    """Nobody can serve it."""


class Judgement(NamedTuple):
    """One exit: `kind` is the class of exits it counts under; `reason` says why it cannot, or what to know.

    `linux`, `xen`: why the #VC handler of Linux and the emulator of Xen refuse the instruction; empty: they serve it.
    """

    path: Path
    kind: str
    reason: str = ""
    linux: str = ""
    xen: str = ""
    insn: bytes = b""
    registers: tuple[tuple[str, int], ...] = ()
    """The instruction, and registers with which it does in another guest what it did here."""


class CallFate(NamedTuple):
    """One operation of a hypercall, made by an encrypted guest in the ABI that it used as a plain one.

    `fate` in words; `survives` without a change; `allowed` to guests at all; `instead`: the ABIs and calls that take
    its place, best first; `shared`: what must be shared memory besides the arguments.
    """

    call: str
    operation: str
    fate: str
    survives: bool
    allowed: bool
    instead: tuple[str, ...] = ()
    shared: str = ""


class Porting(NamedTuple):
    """A feature's part: `judge(exit, is_device)`, where `is_device` says whether a nested fault met a device.

    `subject()` makes a machine whose vCPU 0 runs a guest under the feature. `calls` are the hypercalls that the
    feature's plugin serves, by the number in EAX.
    """

    feature: str
    judge: Callable[[GuestExit, bool], Judgement] | None = None
    subject: Callable[[], Machine] | None = None
    calls: Mapping[int, tuple[CallFate, ...]] | None = None
