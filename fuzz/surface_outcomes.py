"""What a message leads to, in a word; and which words its declaration promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sevlab.core.events import AspStatus, Faulted, Refused, Stopped
from sevlab.core.payload import Message, Payload
from sevlab.core.vocabulary import Record, spec_of
from sevlab.plugins.sev import LEGACY, LEGACY_COMMANDS, Family, MailboxCommand, Status
from sevlab.plugins.sev_es import GhcbReply, MsrInfo, MsrReply, Reason, Reply, Result, VmgexitIgnored
from sevlab.plugins.sev_es.matrix import ALL
from sevlab.plugins.sev_es.msr_layout import INFO_MASK
from sevlab.plugins.sev_es.msr_requests import REQUESTS
from sevlab.plugins.snp.command_table import SNP, SNP_COMMANDS
from sevlab.plugins.snp.ghcb_events import EVENTS as SNP_EVENTS
from sevlab.plugins.snp.ghcb_events import MSR_REQUESTS as SNP_REQUESTS
from sevlab.plugins.xen.numbers import Errno
from sevlab.plugins.xen.records import Hypercalled
from sevlab.traces.records import Found, Violation

DONE = "done"
EVENTS = ALL | SNP_EVENTS
MSR_REQUESTS = REQUESTS | SNP_REQUESTS
SIGN = 1 << 63


def outcome_of(records: tuple[Record, ...]) -> str:
    """The word for what a step led to: a finding before everything, then the record that answers, else the first."""
    for record in records:
        if isinstance(record, (Found, Violation)):
            return f"finding {record.rule}"
    for record in records:
        word = WORDS.get(type(record))
        if word is not None:
            return word(record)
    return spec_of(records[0]).kind if records else "nothing"


def _reply(record: Reply | GhcbReply) -> str:
    if record.info_1 == Result.EXCEPTION:
        return f"exception {record.info_2 & 0xFF}"
    if record.info_1 == Result.MALFORMED:
        return _name(Reason, record.info_2)
    return DONE


def _status(record: AspStatus) -> str:
    return DONE if record.status == Status.SUCCESS else _name(Status, record.status)


def _hypercall(record: Hypercalled) -> str:
    result = record.result
    return _name(Errno, (1 << 64) - result) if result & SIGN else DONE


def _msr(record: MsrReply) -> str:
    return "unchanged" if record.value == record.request else _name(MsrInfo, record.value & INFO_MASK)


def _name(enumeration: Any, value: int) -> str:
    member = enumeration._value2member_map_.get(value)
    return f"{value:#x}" if member is None else str(member.name)


WORDS: dict[type, Callable[[Any], str]] = {
    GhcbReply: _reply,
    MsrReply: _msr,
    AspStatus: _status,
    Hypercalled: _hypercall,
    VmgexitIgnored: lambda _record: "ignored",
    Stopped: lambda _record: "VM stopped",
    Faulted: lambda record: f"fault {record.vector:#x}",
    Refused: lambda _record: "refused",
}


def declared_outcomes(payload: Payload, message: Message) -> tuple[str, ...]:
    """The outcomes that the declaration of a message promises, in words of `outcome_of`."""
    if payload.kind == "asp.command":
        return _of_command(message)
    if payload.kind == "sev_es.vmgexit" and payload.field == "page":
        return tuple(dict.fromkeys(_of_event(message.number)))
    if payload.kind == "sev_es.vmgexit":
        request = MSR_REQUESTS.get(message.number)
        response = None if request is None else request.response
        return () if response is None else (_name(MsrInfo, response),)
    return (DONE,) if payload.kind == "xen.call" else ()


def _of_event(code: int) -> Iterator[str]:
    """What its cases say; without cases what is promised of every event: an answer, and that inputs are needed."""
    event = EVENTS.get(code)
    if event is None:
        return
    if not event.cases:
        yield from (DONE, Reason.MISSING_INPUT.name)
        if event.scratch is not None:
            yield Reason.INVALID_SCRATCH.name
    for case in event.cases:
        if case.expect is not None:
            yield _reply(case.expect)


def _of_command(message: Message) -> tuple[str, ...]:
    for family, commands in ((LEGACY, LEGACY_COMMANDS), (SNP, SNP_COMMANDS)):
        for declared in commands:
            if declared.command == message.number and family.interface == message.record.get("interface"):
                return tuple(dict.fromkeys(_statuses(family, declared)))
    return ()


def _statuses(family: Family, declared: MailboxCommand) -> Iterator[str]:
    """Success, and what the checks of the declaration refuse with; what a handler finds later is its own."""
    yield DONE
    automaton = family.automaton
    if not all(automaton.allows(state, declared.command) for state in automaton.states):
        yield automaton.reject.name
    if declared.buffer is not None:
        yield Status.INVALID_ADDRESS.name
    if declared.reserved is not None and declared.buffer is not None:
        yield declared.reserved.name
    if declared.length_query:
        yield Status.INVALID_LENGTH.name
