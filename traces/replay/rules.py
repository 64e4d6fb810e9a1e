"""Differences between a log and the model that are understood: each a named rule, counted in the report.

A rule gets the exchange and the comparison and says whether it explains it; nothing else is tolerated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from sevlab.core.svm import ExitCode
from sevlab.traces.importers import kvm_exits as ke
from sevlab.traces.importers import kvm_host as kh
from sevlab.traces.importers import kvm_interrupts as ki
from sevlab.traces.importers.log_records import ExitEvent
from sevlab.traces.replay.kvm_checks import NOTHING, Exchange


class Rule(NamedTuple):
    """`explains(exchange, check, recorded, computed)`; `why` with its source."""

    name: str
    why: str
    explains: Callable[[Exchange, str, Any, Any], bool]


def _has(x: Exchange, kind: type) -> bool:
    return any(type(record) is kind for record in x.recorded)


REP = 1 << 3
STRING = 1 << 2
MOVES, REP_PREFIXES = (0xA4, 0xA5), (0xF2, 0xF3)
"""MOVS behind a repeat prefix."""


def _string_goes_on(x: Exchange, check: str, recorded: Any, computed: Any) -> bool:
    if check != "next rip" or recorded != x.step.rip:
        return False
    if x.step.exit_code == ExitCode.IOIO:
        return x.step.exit_info_1 & STRING != 0 and x.step.exit_info_1 & REP != 0 and _has(x, ke.KvmPio)
    return (
        x.step.exit_code == ExitCode.NPF and x.step.insn[-1:] in (b"\xa4", b"\xa5") and x.step.insn[0] in (0xF3, 0xF2)
    )


def _smm_entry(x: Exchange, check: str, recorded: Any, computed: Any) -> bool:
    entering = any(type(record) is kh.KvmSmmTransition and record.entering for record in x.recorded)
    return entering and check == "next rip" and recorded == 0x8000


def _rsm(x: Exchange, check: str, recorded: Any, computed: Any) -> bool:
    return check == "next rip" and x.step.exit_code == ExitCode.RSM


def _lazy_debug(x: Exchange, check: str, recorded: Any, computed: Any) -> bool:
    return check == "next rip" and 0x20 <= x.step.exit_code < 0x40 and not x.step.insn and recorded == x.step.rip


def _read_modify_write(x: Exchange, check: str, recorded: Any, computed: Any) -> bool:
    decoded = x.first("captured.decoded")
    return check == "write bit" and recorded is False and decoded is not None and decoded.reads and decoded.writes


def _reserved_bit(x: Exchange, check: str, recorded: Any, computed: Any) -> bool:
    if check != "reserved bit" or recorded is not False:
        return False
    return x.context.slots > x.context.pages.get(x.step.exit_info_2 >> 12, x.context.slots)


def _event_overwritten(x: Exchange, check: str, recorded: Any, computed: Any) -> bool:
    if check != "EXITINTINFO vector":
        return False
    event = next(record for record in x.recorded if isinstance(record, ExitEvent))
    return event.intr_info >> 8 & 7 in (3, 4)


def _efer_lma(x: Exchange, check: str, recorded: Any, computed: Any) -> bool:
    return check == "MSR value" and dict(x.step.registers).get("rcx") == 0xC000_0080 and recorded == computed | 1 << 10


def _counter_width(x: Exchange, check: str, recorded: Any, computed: Any) -> bool:
    return check == "MSR value" and dict(x.step.registers).get("rcx") == 0xC001_0007 and recorded == 0


def _other_reason(x: Exchange, check: str, recorded: Any, computed: Any) -> bool:
    if check != "user-space reason":
        return False
    record = next(r for r in x.recorded if type(r) is kh.KvmUserspaceExit and r.number == recorded)
    return record.reason in ("restart", "error") or record.number in (12, 26)


def _halted(x: Exchange, check: str, recorded: Any, computed: Any) -> bool:
    return (
        check == "next rip" and computed == NOTHING and x.step.exit_code == ExitCode.HLT and not _has(x, ki.KvmInjVirq)
    )


def _emulator_cpuid(x: Exchange, check: str, recorded: Any, computed: Any) -> bool:
    return check == "CPUID without its exit" and bool(x.step.insn)


def _no_xen(x: Exchange, check: str, recorded: Any, computed: Any) -> bool:
    return check == "hypercall" and computed == NOTHING and "hypercall" in x.supplied


RULES: tuple[Rule, ...] = (
    Rule("no handler: xen", "the machine that replays has no plugin that serves Xen's hypercalls", _no_xen),
    Rule(
        "CPUID of the emulator",
        "KVM's instruction emulator asks for the vendor itself (arch/x86/kvm/emulate.c)",
        _emulator_cpuid,
    ),
    Rule(
        "string goes on",
        "KVM serves one chunk of a repeated string instruction and lets the guest execute it again; the exit with RCX 0"
        " ends it (Linux arch/x86/kvm/emulate.c, x86_emulate_insn)",
        _string_goes_on,
    ),
    Rule("SMM entry", "a write to port B2h raised an SMI: the guest goes on at 8000h (24593, 10.3.1)", _smm_entry),
    Rule("RSM", "RSM goes on where the state save area says, which no log shows (24593, 10.3.5)", _rsm),
    Rule(
        "debug registers on demand",
        "KVM drops the intercept at the first access and the guest executes it again (svm.c, dr_interception)",
        _lazy_debug,
    ),
    Rule(
        "TCG reports read-modify-write as read",
        "the captured processor walks the nested tables for the read first, and the write bit stays clear",
        _read_modify_write,
    ),
    Rule(
        "mapping was dropped",
        "a device page seen before faults without the reserved bit: the guest wrote PCI configuration since its last"
        " fault, which may change memory slots, and KVM then drops the mappings (kvm_mmu_invalidate_mmio_sptes)",
        _reserved_bit,
    ),
    Rule(
        "event overwritten",
        "EXITINTINFO without its valid bit is what the processor delivered last: a later exception or INT n",
        _event_overwritten,
    ),
    Rule("EFER.LMA", "the processor sets LMA when paging is switched on with LME (24593, 14.6)", _efer_lma),
    Rule("counter MSR", "KVM keeps no value for C0010007h and reads 0", _counter_width),
    Rule("other user-space reason", "signals, APIC task priority and I/O APIC EOIs ask user space, too", _other_reason),
    Rule(
        "halted without an interrupt",
        "KVM goes on for other reasons (a kick, IF clear); the model sleeps until an interrupt comes",
        _halted,
    ),
)


def explanation(x: Exchange, check: str, recorded: Any, computed: Any) -> str:
    """Name of the rule that explains the difference; empty when none does."""
    for rule in RULES:
        if rule.explains(x, check, recorded, computed):
            return rule.name
    return ""
