"""What fuzzing of the GHCB needs, as data: what a VMGEXIT carries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.payload import Message, Payload
from sevlab.core.units import PAGE_MASK
from sevlab.plugins.sev_es.ghcb import SHARED_BUFFER_OFFSET, Ghcb
from sevlab.plugins.sev_es.matrix import ALL, event_name
from sevlab.plugins.sev_es.msr_layout import INFO_MASK, LAYOUTS, MsrInfo
from sevlab.plugins.sev_es.msr_requests import REQUESTS
from sevlab.plugins.sev_es.records import Vmgexit

if TYPE_CHECKING:
    from sevlab.core.machine import Machine
    from sevlab.core.vocabulary import Record

GHCB_GPA = 0x5000
"""Where fuzzed guests have their GHCB."""

CODE = Ghcb.FIELDS["sw_exit_code"]


def _page_message(record: Record) -> int | None:
    if not isinstance(record, Vmgexit) or record.ghcb_msr & INFO_MASK:
        return None
    return int.from_bytes(record.page[CODE.offset : CODE.offset + 8], "little")


def _msr_message(record: Record) -> int | None:
    if not isinstance(record, Vmgexit) or not record.ghcb_msr & INFO_MASK:
        return None
    return record.ghcb_msr & INFO_MASK


def _place(machine: Machine, record: Record) -> int | None:
    """SPA of the GHCB that a VMGEXIT names."""
    vcpu = machine.vcpus.get(getattr(record, "vcpu", -1))
    msr = getattr(record, "ghcb_msr", 0)
    return None if vcpu is None or msr & PAGE_MASK else machine.access.translate_gpa(vcpu, msr)


PAYLOADS: tuple[Payload, ...] = (
    Payload(
        "sev_es.vmgexit",
        "page",
        _page_message,
        tuple(
            Message(
                int(code),
                event_name(code),
                Ghcb,
                {"ghcb_msr": GHCB_GPA},
                {
                    "sw_exit_code": int(code),
                    "sw_exit_info_1": 0,
                    "sw_exit_info_2": 0,
                    "protocol_version": 2,
                    **event.example,
                    **({} if event.scratch is None else {"sw_scratch": GHCB_GPA + SHARED_BUFFER_OFFSET}),
                },
                event.inputs,
            )
            for code, event in sorted(ALL.items())
        ),
        layout=Ghcb,
        place_of=_place,
    ),
    Payload(
        "sev_es.vmgexit",
        "ghcb_msr",
        _msr_message,
        tuple(
            Message(int(info), MsrInfo(info).name, LAYOUTS[info], fields={"info": int(info)})
            for info in sorted(REQUESTS)
        ),
    ),
)
