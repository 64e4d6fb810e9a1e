"""What becomes of a plain guest's exit when the guest is encrypted: judgements of features, as plain data.

`sevlab assess` asks every feature. A feature brings a judge, a subject - a machine with a guest under that feature, in
which the exchange that takes the exit's place is executed - or both.
"""

from __future__ import annotations

from collections.abc import Callable
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


class Porting(NamedTuple):
    """A feature's part: `judge(exit, is_device)`, where `is_device` says whether a nested fault met a device.

    `subject()` makes a machine whose vCPU 0 runs a guest under the feature.
    """

    feature: str
    judge: Callable[[GuestExit, bool], Judgement] | None = None
    subject: Callable[[], Machine] | None = None
