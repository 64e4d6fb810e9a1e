"""What a Linux kernel does on its own when something is wrong: it prints, it panics, it dies of an oops.

Under a hostile hypervisor the first is skipped - a console of one exit a character would take most of the time - and
the others end the run. To refuse and to stop is right: only an oops, or a panic for another reason, is a finding.
Source: Linux kernel/printk/printk.c, kernel/panic.c, arch/x86/kernel/dumpstack.c, arch/x86/coco/sev, and
arch/x86/include/asm/extable.h (an entry: three 32-bit numbers, the first relative to itself).
"""

from __future__ import annotations

from struct import iter_unpack
from typing import TYPE_CHECKING

from sevlab.core.cpu import FaultUnwind
from sevlab.core.units import MASK64, PAGE_BYTES, PAGE_MASK

if TYPE_CHECKING:
    from collections.abc import Callable

    from sevlab.plugins.engines.hostile_run import HostileRun
    from sevlab.plugins.engines.symbols import Symbols

LONGEST_TEXT = 160
CRASH_WORDS = ("BUG:", "Oops", "general protection", "unable to handle", "double fault", "corrupt", "stack guard",
               "KASAN", "KCSAN", "UBSAN", "kernel stack overflow")  # fmt: skip
REFUSALS = ("SEV", "sev", "#VC", "VC exception", "Terminate-Request", "hypervisor", "Unexpected external interrupt")
"""In a panic's text: the kernel stops because of what the hypervisor did."""
EX_ENTRY = "<iii"
EX_ENTRY_BYTES = 12


def prepare(run: HostileRun, symbols: Symbols) -> None:
    """Answer what the kernel would print, and know which faults it expects."""
    answers: dict[str, Callable[[HostileRun], bool]] = {
        "_printk": _printed,
        "panic": _panicked,
        "oops_begin": _died,
        "show_regs": _complained,
    }
    for name, answer in answers.items():
        address = symbols.address(name)
        if address is not None:
            run.marks[address] = answer
    start, end = (symbols.address(f"__{edge}___ex_table") or 0 for edge in ("start", "stop"))
    run.expected_faults = _expected_faults(run, start, end)


def _expected_faults(run: HostileRun, start: int, end: int) -> frozenset[int]:
    """The instructions in the kernel's exception table, none when it cannot be read."""
    count = max(0, end - start) // EX_ENTRY_BYTES
    try:
        data = run.machine.access.guest_read(run.vcpu, start, count * EX_ENTRY_BYTES) if count else b""
    except FaultUnwind:
        return frozenset()
    return frozenset(
        start + number * EX_ENTRY_BYTES + entry[0] & MASK64 for number, entry in enumerate(iter_unpack(EX_ENTRY, data))
    )


def _text(run: HostileRun) -> str:
    """The format string that is the first argument of a call."""
    address = run.vcpu.regs.rdi
    try:
        length = min(LONGEST_TEXT, PAGE_BYTES - (address & PAGE_MASK))
        data = run.machine.access.guest_read(run.vcpu, address, length)
    except FaultUnwind:
        return "?"
    text = data.partition(b"\0")[0].decode("ascii", "replace")
    return (text[2:] if text[:1] == "\x01" else text).strip()


def _printed(run: HostileRun) -> bool:
    text = _text(run)
    run.texts.append(text)
    if any(word in text for word in CRASH_WORDS):
        run.find_crash("text", f"the kernel prints {text!r}")
    return True


def _panicked(run: HostileRun) -> bool:
    text = _text(run)
    run.texts.append(text)
    run.end(f"panic: {text}")
    if not any(word in text for word in REFUSALS):
        run.find_crash("text", f"the kernel panics: {text!r}")
    return False


def _died(run: HostileRun) -> bool:
    run.end("oops")
    if not run.claimed:
        run.find_crash("text", f"an oops; before it: {'; '.join(run.texts[-3:]) or 'nothing printed'}")
    return False


def _complained(run: HostileRun) -> bool:
    run.end("the kernel shows its registers")
    return False
