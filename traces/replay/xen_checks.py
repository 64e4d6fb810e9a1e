"""What of an exchange in a xentrace the model computes.

Xen's log shows data, not how the guest asked for it: CPUID answers and MSRs seen before, and reads of devices that
follow from earlier writes, are computed; ports, sizes and addresses would only be read back. Of a hypercall it has the
number: that the ABI of the caller's mode leads there, and that Xen has such a call, is checked; operation, arguments
and result are not in the log. What is neither compared nor an input is counted as unchecked, by event: vectors of
injected interrupts, since the log has no lines and no requests, and reads of a width that is not in the log.
"""

from __future__ import annotations

from collections.abc import Iterator

from sevlab.core.svm import ExitCode
from sevlab.traces.importers import xentrace as xt
from sevlab.traces.importers.log_records import XenEvent
from sevlab.traces.replay.kvm_checks import NOTHING, Comparison, Exchange

GUESTS_OWN = frozenset((xt.IOPORT_WRITE, *xt.IOMEM_WRITES, xt.MSR_WRITE, xt.CR_WRITE, xt.DR_WRITE, xt.NPF))
"""Events that tell what the guest did, of which the step was made: values and addresses."""
HOST_BUSINESS = frozenset(
    (xt.VMENTRY, xt.NESTED_VMENTRY, xt.INTR, xt.INTR_WINDOW, xt.LOST_RECORDS, *xt.EMULATED_TIMERS)
)
"""Events of Xen's own: interrupts of the host, windows, its models of timers and of the PIC."""
ONE_BYTE_PORTS = frozenset((*range(0x3F8, 0x400), 0x21, 0xA1, 0x70, 0x71))
"""Serial port, PIC, CMOS: their accesses are one byte wide. The log does not say the width, and
of a port that nobody has it shows 32 ones."""


def event(x: Exchange, record: XenEvent) -> Iterator[Comparison]:
    """One record."""
    number, words = record
    if number == xt.CPUID and len(words) >= 6 and "cpuid" not in x.supplied:
        result = x.first("cpuid-result")
        for at, name in enumerate(("eax", "ebx", "ecx", "edx"), 2):
            yield name, words[at], NOTHING if result is None else getattr(result, name)
    elif number == xt.MSR_READ and len(words) >= 3 and "value" not in x.supplied and not x.step.refused:
        value = x.first("value")
        yield "MSR value", words[1] | words[2] << 32, NOTHING if value is None else value.value
    elif number in xt.IOMEM_READS and x.step.answers and "value" not in x.supplied:
        access = x.first("io.mmio")
        if access is not None:
            yield "device value", words[-1], access.value
    elif number == xt.VMMCALL and words:
        called = x.first("xen.called")
        yield "hypercall", words[0], NOTHING if called is None else called.number
        if called is not None:
            yield "hypercall known", True, bool(called.abi)
    elif number == xt.INJ_EXC and len(words) >= 2:
        injected = x.first("injected")
        yield "injected exception", words[0], NOTHING if injected is None else injected.event & 0xFF
    elif number in (xt.IOPORT_READ, xt.IOPORT_WRITE) and x.step.exit_code == ExitCode.IOIO and len(words) > 1:
        port = x.first("io.port")
        if number == xt.IOPORT_READ and words[0] in ONE_BYTE_PORTS and "value" not in x.supplied:
            yield "device value", words[1] & 0xFF, NOTHING if port is None else port.value


def account(x: Exchange, record: XenEvent) -> tuple[str, str]:
    """What a record is of which nothing was compared: ("input" or "unchecked", its name), or nothing ("", "")."""
    number = record.event
    if number in HOST_BUSINESS or x.supplied:
        return "", ""
    name = xt.NAMES.get(number, f"{number:#x}")
    return ("input" if number in GUESTS_OWN else "unchecked"), name
