"""The reference hypervisor's side of the events that reach devices: IOIO, MMIO read, MMIO write.

Source: 56421, 4.1; Linux arch/x86/kvm/svm/sev.c (sev_es_string_io, sev_handle_vmgexit) and x86.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.exitinfo import IOIO_IN, IOIO_STRING, ioio_word
from sevlab.core.svm import ExitCode
from sevlab.core.units import MASK64
from sevlab.plugins.sev_es.declare import (
    DONE,
    INVALID_INPUT,
    INVALID_SCRATCH,
    MISSING_INPUT,
    Case,
    NaeEvent,
    Need,
    Reply,
)
from sevlab.plugins.sev_es.devices import mmio_read, mmio_write, port_in, port_out, port_out_string
from sevlab.plugins.sev_es.events import INFOS
from sevlab.plugins.sev_es.ghcb import SHARED_BUFFER_BYTES, Ghcb, NaeCode
from sevlab.plugins.sev_es.scratch import Scratch

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

WIDTHS = (1, 2, 4)
MMIO_MAX_BYTES = 8
"""Longest MMIO access of version 2."""


def ioio(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """IOIO: a register access, or a string of SW_EXITINFO2 elements in the scratch area.

    Without a size bit, or a string of no elements, there is nothing to do. A short IN keeps the rest of RAX, a 4-byte
    one clears it. Two size bits at once name no width; that this is invalid input is UNVERIFIED.
    Source: 56421, 4.1; Linux arch/x86/kvm/svm/sev.c (sev_es_string_io) and x86.c (kvm_fast_pio_in).
    """
    info = ghcb.sw_exit_info_1
    width, port = info >> 4 & 7, info >> 16 & 0xFFFF
    if width not in WIDTHS:
        return INVALID_INPUT if width else DONE
    if info & IOIO_STRING:
        if scratch is None:
            return DONE
        if info & IOIO_IN:
            elements = (port_in(machine, vcpu, port, width) for _ in range(ghcb.sw_exit_info_2))
            scratch.write(b"".join(value.to_bytes(width, "little") for value in elements))
        else:
            port_out_string(machine, vcpu, port, width, scratch.data)
        return DONE
    if info & IOIO_IN:
        value = port_in(machine, vcpu, port, width)
        return Reply(0, 0, ghcb.rax & -(1 << width * 8) & MASK64 | value if width < 4 else value)
    port_out(machine, vcpu, port, width, ghcb.rax)
    return DONE


def _string_bytes(ghcb: Ghcb) -> int:
    info = ghcb.sw_exit_info_1
    width = info >> 4 & 7
    return width * ghcb.sw_exit_info_2 if info & IOIO_STRING and width in WIDTHS else 0


def _is_register_out(ghcb: Ghcb) -> bool:
    return not ghcb.sw_exit_info_1 & (IOIO_IN | IOIO_STRING)


def _is_string(ghcb: Ghcb) -> bool:
    return bool(ghcb.sw_exit_info_1 & IOIO_STRING)


def mmio_in(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """MMIO read: SW_EXITINFO2 bytes at the GPA in SW_EXITINFO1 go to the scratch area.

    Source: 56421, 4.1; Linux arch/x86/kvm/svm/sev.c (SVM_VMGEXIT_MMIO_READ).
    """
    if ghcb.protocol_version >= 2 and ghcb.sw_exit_info_2 > MMIO_MAX_BYTES:
        return INVALID_INPUT
    return mmio_in_any_length(machine, vcpu, ghcb, scratch)


def mmio_in_any_length(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """MMIO read as KVM before 2026 does it: any length that fits the scratch area.

    Source: Linux arch/x86/kvm/svm/sev.c, v6.12.
    """
    if scratch is not None:
        scratch.write(mmio_read(machine, vcpu, ghcb.sw_exit_info_1, ghcb.sw_exit_info_2))
    return DONE


def mmio_out(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """MMIO write: SW_EXITINFO2 bytes of the scratch area go to the GPA in SW_EXITINFO1.

    Source: 56421, 4.1; Linux arch/x86/kvm/svm/sev.c (SVM_VMGEXIT_MMIO_WRITE).
    """
    if ghcb.protocol_version >= 2 and ghcb.sw_exit_info_2 > MMIO_MAX_BYTES:
        return INVALID_INPUT
    return mmio_out_any_length(machine, vcpu, ghcb, scratch)


def mmio_out_any_length(machine: Machine, vcpu: Vcpu, ghcb: Ghcb, scratch: Scratch | None) -> Reply:
    """MMIO write as KVM before 2026 does it. Source: Linux arch/x86/kvm/svm/sev.c, v6.12."""
    if scratch is not None:
        mmio_write(machine, vcpu, ghcb.sw_exit_info_1, scratch.data)
    return DONE


def _length(ghcb: Ghcb) -> int:
    return ghcb.sw_exit_info_2


def _short_length(ghcb: Ghcb) -> int:
    """Nothing of the scratch area is touched when the length itself is refused."""
    return 0 if ghcb.protocol_version >= 2 and ghcb.sw_exit_info_2 > MMIO_MAX_BYTES else ghcb.sw_exit_info_2


OUT_BYTE = ioio_word(0x80, 1, is_in=False)
IN_BYTE = ioio_word(0x80, 1, is_in=True)
OUTS_BYTE = ioio_word(0x80, 1, is_in=False, string=True, rep=True)
INS_DWORD = ioio_word(0x80, 4, is_in=True, string=True, rep=True)
SHARED_BUFFER = -1
"""In an example or case: the GPA of the shared buffer of the page that is used."""

_SCRATCH_CASES = (
    Case("sw_scratch", "zero", 0, INVALID_SCRATCH),
    Case("sw_scratch", "limit", SHARED_BUFFER, DONE, note="the shared buffer"),
    Case("sw_scratch", "past", 1, INVALID_SCRATCH, note="a GPA outside the page, version 2"),
    Case("sw_scratch", "reserved", MASK64, INVALID_SCRATCH, note="start and length wrap around"),
)


def _silent(*cases: Case) -> tuple[Case, ...]:
    """Cases whose plain DONE returns no register, although the event has one for IN."""
    return tuple(case._replace(returns=()) if case.expect == DONE else case for case in cases)


EVENTS: dict[int, NaeEvent] = {
    ExitCode.IOIO: NaeEvent(
        "IOIO",
        ioio,
        optional=("rax",),
        needs=(
            Need(("rax",), "OUT of a register", _is_register_out),
            Need(("sw_scratch",), "string", _is_string),
        ),
        outputs=("rax",),
        scratch=_string_bytes,
        example={"sw_exit_info_1": OUT_BYTE, "rax": 0x41},
        cases=_silent(
            *INFOS,
            Case("sw_exit_info_1", "zero", 0, DONE, note="no size bit: nothing to do"),
            Case("sw_exit_info_1", "limit", IN_BYTE, Reply(rax=0xFF), {"rax": 0}, "nothing at the port"),
            Case("sw_exit_info_1", "past", OUT_BYTE | 2 << 4, INVALID_INPUT, note="two size bits"),
            Case("sw_exit_info_1", "reserved", OUT_BYTE | 1 << 1 | 7 << 13, DONE, note="reserved bits are not judged"),
            Case("rax", "absent", None, MISSING_INPUT, note="OUT"),
            Case("rax", "absent", None, Reply(rax=0xFF), {"sw_exit_info_1": IN_BYTE}, "IN: reads 0"),
            Case("rax", "zero", 0, DONE),
            Case("rax", "limit", MASK64, DONE),
            Case("sw_exit_info_2", "zero", 0, DONE, {"sw_exit_info_1": OUTS_BYTE, "sw_scratch": SHARED_BUFFER}),
            Case(
                "sw_exit_info_2",
                "limit",
                SHARED_BUFFER_BYTES,
                DONE,
                {"sw_exit_info_1": OUTS_BYTE, "sw_scratch": SHARED_BUFFER},
            ),
            Case(
                "sw_exit_info_2",
                "past",
                SHARED_BUFFER_BYTES + 1,
                INVALID_SCRATCH,
                {"sw_exit_info_1": OUTS_BYTE, "sw_scratch": SHARED_BUFFER},
            ),
            Case(
                "sw_exit_info_2",
                "limit",
                SHARED_BUFFER_BYTES // 4,
                DONE,
                {"sw_exit_info_1": INS_DWORD, "sw_scratch": SHARED_BUFFER},
                "four bytes an element",
            ),
            Case(
                "sw_exit_info_2",
                "past",
                SHARED_BUFFER_BYTES // 4 + 1,
                INVALID_SCRATCH,
                {"sw_exit_info_1": INS_DWORD, "sw_scratch": SHARED_BUFFER},
            ),
            Case("sw_exit_info_2", "reserved", MASK64, DONE, note="not looked at without a string"),
            Case("sw_scratch", "absent", None, MISSING_INPUT, {"sw_exit_info_1": OUTS_BYTE, "sw_exit_info_2": 1}),
            *(case._replace(given={"sw_exit_info_1": OUTS_BYTE, "sw_exit_info_2": 1}) for case in _SCRATCH_CASES),
        ),
        source="56421, 4.1; Linux arch/x86/kvm/svm/sev.c (sev_es_validate_vmgexit, sev_es_string_io)",
    ),
    **{
        code: NaeEvent(
            name,
            handler,
            required=("sw_scratch",),
            context=("protocol_version",),
            scratch=_short_length,
            example={"sw_exit_info_1": 0xD000_0000, "sw_exit_info_2": 4, "sw_scratch": SHARED_BUFFER},
            cases=(
                *INFOS,
                Case("sw_exit_info_1", "zero", 0, DONE, note="nothing is there"),
                Case("sw_exit_info_1", "limit", MASK64, DONE, note="nothing is there"),
                Case("sw_exit_info_2", "zero", 0, DONE, note="nothing to do"),
                Case("sw_exit_info_2", "limit", MMIO_MAX_BYTES, DONE),
                Case("sw_exit_info_2", "past", MMIO_MAX_BYTES + 1, INVALID_INPUT, note="version 2"),
                Case("sw_exit_info_2", "reserved", MASK64, INVALID_INPUT, note="version 2"),
                Case("sw_scratch", "absent", None, MISSING_INPUT),
                *_SCRATCH_CASES,
            ),
            source="56421, 4.1; Linux arch/x86/kvm/svm/sev.c",
        )
        for code, name, handler in (
            (NaeCode.MMIO_READ, "MMIO read", mmio_in),
            (NaeCode.MMIO_WRITE, "MMIO write", mmio_out),
        )
    },
}

KVM_6_12: dict[int, NaeEvent] = {
    NaeCode.MMIO_READ: EVENTS[NaeCode.MMIO_READ]._replace(handler=mmio_in_any_length, scratch=_length),
    NaeCode.MMIO_WRITE: EVENTS[NaeCode.MMIO_WRITE]._replace(handler=mmio_out_any_length, scratch=_length),
}
"""The same events with the checks of KVM before 2026."""
