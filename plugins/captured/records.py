"""What the model finds out about a captured exit beside its outcome."""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.vocabulary import Boundary, Checked, outcome


@outcome("captured.decoded", Boundary.CPU)
class Decoded(NamedTuple):
    """The instruction of the exit: its length (0: the bytes are none), and whether it reads or writes memory."""

    length: Checked[int]
    reads: Checked[bool]
    writes: Checked[bool]


@outcome("captured.apic", Boundary.DEVICE)
class ApicAccessed(NamedTuple):
    """The local APIC's register at `offset` was accessed, through its window or its MSR."""

    offset: Checked[int]
    write: Checked[bool]


@outcome("captured.eoi", Boundary.DEVICE)
class InterruptEnded(NamedTuple):
    """The highest interrupt in service ended; 0 when none was."""

    vector: Checked[int]


@outcome("captured.pic-ack", Boundary.DEVICE)
class PicAcknowledged(NamedTuple):
    """A line of a PIC has nothing more in service: its handler ended, or the controller was set up anew."""

    slave: Checked[bool]
    pin: Checked[int]


@outcome("captured.ipi", Boundary.DEVICE)
class InterruptCommand(NamedTuple):
    """What the interrupt command register asks for. Source: spec 24593, figure 16-18."""

    destination: Checked[int]
    vector: Checked[int]
    mode: Checked[int]
    logical: Checked[bool]
    asserted: Checked[bool]
    level: Checked[bool]
    shorthand: Checked[int]
