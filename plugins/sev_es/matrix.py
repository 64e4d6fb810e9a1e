"""The matrix of events, input fields and outcomes, for documentation: made from the declarations alone."""

from __future__ import annotations

from sevlab.core.svm import exit_name
from sevlab.plugins.sev_es.declare import Case, NaeEvent, Reply
from sevlab.plugins.sev_es.events import EVENTS as REGISTER_EVENTS
from sevlab.plugins.sev_es.ghcb import NaeCode, Reason, Result
from sevlab.plugins.sev_es.io_events import EVENTS as IO_EVENTS
from sevlab.plugins.sev_es.io_events import SHARED_BUFFER
from sevlab.plugins.sev_es.msr_layout import LAYOUTS, TERMINATION_REASONS, MsrInfo
from sevlab.plugins.sev_es.msr_requests import REQUESTS

ALL: dict[int, NaeEvent] = REGISTER_EVENTS | IO_EVENTS


def event_name(code: int) -> str:
    """The name of an exit code of either kind."""
    return NaeCode(code).name if code in NaeCode._value2member_map_ else exit_name(code)


def outcome_words(case: Case) -> str:
    """What a case is answered, in words."""
    if case.expect is None:
        return f"no answer: {case.note}"
    return reply_words(case.expect)


def reply_words(reply: Reply) -> str:
    """What a reply says."""
    if reply.info_1 == Result.MALFORMED:
        return f"refused, reason {reply.info_2:d} ({Reason(reply.info_2).name.lower().replace('_', ' ')})"
    if reply.info_1 == Result.EXCEPTION:
        return {6: "#UD", 13: "#GP"}[reply.info_2 & 0xFF]
    return "done"


def _value(case: Case) -> str:
    if case.value is None:
        return ""
    return "the shared buffer" if case.value == SHARED_BUFFER else f"`{case.value:#x}`"


def markdown_table() -> str:
    """Event, field, kind of value, value, outcome."""
    lines = ["| Event | Field | Value | | Outcome | Remark |", "| --- | --- | --- | --- | --- | --- |"]
    for code, event in sorted(ALL.items()):
        for case in event.cases:
            given = ", ".join(f"{name} {_value(case._replace(value=value))}" for name, value in case.given.items())
            remark = "; ".join(part for part in (case.note if case.expect is not None else "", given) if part)
            lines.append(
                f"| {event.name} ({code:#x}) | `{case.field}` | {case.kind} | {_value(case)} | {outcome_words(case)}"
                f" | {remark} |"
            )
    return "\n".join(lines)


def events_table() -> str:
    """What each event reads and returns."""
    lines = [
        "| Event | Code | Since | Required | Also read | Returns | Source |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for code, event in sorted(ALL.items()):
        conditional = [f"{', '.join(need.fields)} ({need.when})" for need in event.needs]
        more = "; ".join(
            [*conditional, *(name for name in event.optional if not any(name in n.fields for n in event.needs))]
        )
        lines.append(
            f"| {event.name} | {code:#x} | {event.since} | {', '.join(event.required)} | {more}"
            f" | {', '.join(event.outputs)} | {event.source} |"
        )
    return "\n".join(lines)


def msr_table() -> str:
    """Every value of the MSR protocol."""
    lines = ["| Info | Name | Layout | Answered by | Since | SNP only |", "| --- | --- | --- | --- | --- | --- |"]
    for info in MsrInfo:
        request = REQUESTS.get(info)
        answer = f"{request.response:#05x}" if request is not None and request.response is not None else ""
        since, snp = (str(request.since), "yes" if request.snp_only else "") if request is not None else ("", "")
        name = info.name.lower().replace("_", " ")
        lines.append(f"| {info:#05x} | {name} | `{LAYOUTS[info].__name__}` | {answer} | {since} | {snp} |")
    return "\n".join(lines)


def termination_table() -> str:
    """The reasons of a termination."""
    lines = ["| Set | Code | Sent by | Meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| {row.reason_set} | {row.code} | {row.sender} | {row.meaning} |" for row in TERMINATION_REASONS]
    return "\n".join(lines)


def options_table() -> str:
    """The policy switches."""
    from sevlab.plugins.sev_es.states import OPTIONS

    lines = ["| Option | Default | Legal | Meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{row.name}` | {row.default} | {row.legal} | {row.doc} |" for row in OPTIONS]
    return "\n".join(lines)
