"""What of an exchange in a xentrace the model computes.

Xen's log shows data, not how the guest asked for it: CPUID answers and MSRs seen before, and reads of devices that
follow from earlier writes, are computed; ports, sizes and addresses would only be read back. Of a hypercall it has the
number: that the ABI of the caller's mode leads there, and that Xen has such a call, is checked; operation, arguments
and result are not in the log.
"""

from __future__ import annotations

from collections.abc import Iterator

from sevlab.core.svm import ExitCode
from sevlab.traces.importers import xentrace as xt
from sevlab.traces.importers.log_records import XenEvent
from sevlab.traces.replay.kvm_checks import NOTHING, Comparison, Exchange

SERIAL_AND_PIC = frozenset((*range(0x3F8, 0x400), 0x21, 0xA1))
"""Ports whose accesses are one byte wide: the log does not say the width."""


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
        if number == xt.IOPORT_READ and words[0] in SERIAL_AND_PIC and "value" not in x.supplied:
            yield "device value", words[1], NOTHING if port is None else port.value
