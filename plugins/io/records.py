"""Records of the I/O boundary."""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.vocabulary import Boundary, Checked, Derived, Input, outcome, step


@outcome("io.port", Boundary.DEVICE)
class PortAccessed(NamedTuple):
    """A device saw an access to its port; of a string, `value` is the first of `elements`."""

    port: Checked[int]
    width: Checked[int]
    is_in: Checked[bool]
    value: Checked[int]
    elements: Checked[int]


@outcome("io.mmio", Boundary.DEVICE)
class MmioAccessed(NamedTuple):
    """A device saw an access to its window."""

    gpa: Checked[int]
    width: Checked[int]
    write: Checked[bool]
    value: Checked[int]


@outcome("io.unserved", Boundary.CPU)
class Unserved(NamedTuple):
    """The hypervisor cannot serve this exit in this mode; `reason` in the words of the coverage matrix."""

    vcpu: Derived[int]
    exit_code: Checked[int]
    reason: Checked[str]


@step("io.line", Boundary.DEVICE)
class InterruptLine(NamedTuple):
    """A device outside the model raises or lowers interrupt line `irq` (0 to 15) of a VM."""

    vm: Input[int]
    irq: Input[int]
    level: Input[bool]


@step("io.serial", Boundary.DEVICE)
class SerialInput(NamedTuple):
    """Bytes arrive on the serial line of a VM."""

    vm: Input[int]
    data: Input[bytes]
