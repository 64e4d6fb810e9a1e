"""What the firmware makes of a hypervisor's CPUID values: right, or corrected.

A guest may be told of less than the processor has, never of more. Which registers are compared how is, beyond that
sentence, the model's reading: UNVERIFIED. Source: 56860, CPUID reporting; Linux arch/x86/coco/sev (which fields a
guest takes from the hypervisor all the same).
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from sevlab.plugins.snp.guest_pages import CPUID_ENTRIES_MAX, CpuidEntry, CpuidHeader

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

REGISTERS = ("eax", "ebx", "ecx", "edx")


class Rule(Enum):
    """How one register of one function is compared with the processor's."""

    EQUAL = "the processor's value"
    SUBSET = "no bit that the processor has not"
    AT_MOST = "not above the processor's"
    FREE = "the hypervisor's choice"


class FunctionRule(NamedTuple):
    """The rules of a function's four registers."""

    eax: Rule
    ebx: Rule
    ecx: Rule
    edx: Rule


_E, _S, _M, _F = Rule.EQUAL, Rule.SUBSET, Rule.AT_MOST, Rule.FREE
FEATURES = FunctionRule(_S, _S, _S, _S)
TOPOLOGY = FunctionRule(_F, _F, _F, _F)
DEFAULT = FunctionRule(_E, _E, _E, _E)

RULES: dict[int, FunctionRule] = {
    0x0000_0000: FunctionRule(_M, _E, _E, _E),
    0x0000_0001: FunctionRule(_E, _F, _S, _S),
    0x0000_0007: FunctionRule(_M, _S, _S, _S),
    0x0000_000B: TOPOLOGY,
    0x0000_000D: FunctionRule(_S, _F, _M, _S),
    0x8000_0000: FunctionRule(_M, _E, _E, _E),
    0x8000_0001: FunctionRule(_E, _F, _S, _S),
    0x8000_0008: FunctionRule(_M, _S, _F, _F),
    0x8000_000A: FEATURES,
    0x8000_001E: TOPOLOGY,
    0x8000_001F: FunctionRule(_S, _F, _F, _F),
    0x8000_0021: FEATURES,
}
"""Rules by function; APIC ids and topology stay the hypervisor's business."""

HYPERVISOR_BIT = 1 << 31
"""ECX of function 1: the processor has it clear, every hypervisor sets it. Source: 24594, CPUID Fn0000_0001."""


def corrected_entry(machine: Machine, entry: CpuidEntry) -> CpuidEntry:
    """The entry as the firmware lets it pass."""
    if 0x4000_0000 <= entry.eax_in < 0x5000_0000:
        return entry.replace(reserved_28=0)
    actual = machine.cpuid(None, entry.eax_in, entry.ecx_in)
    rules = RULES.get(entry.eax_in, DEFAULT)
    values = {}
    for name, rule, own in zip(REGISTERS, rules, actual, strict=True):
        given = getattr(entry, name)
        if entry.eax_in == 1 and name == "ecx":
            own |= HYPERVISOR_BIT
        values[name] = {
            Rule.EQUAL: own,
            Rule.SUBSET: given & own,
            Rule.AT_MOST: min(given, own),
            Rule.FREE: given,
        }[rule]
    return entry.replace(reserved_28=0, **values)


def corrected_table(machine: Machine, table: bytes) -> bytes | None:
    """The CPUID page or message as the firmware lets it pass; None: its head is wrong and nothing can be corrected."""
    header = CpuidHeader.from_bytes(table[: CpuidHeader.SIZE])
    length_bytes = CpuidHeader.SIZE + header.count * CpuidEntry.SIZE
    if not header.count <= CPUID_ENTRIES_MAX or length_bytes > len(table):
        return None
    out = bytearray(header.replace(reserved_4=0, reserved_8=0).to_bytes())
    for start in range(CpuidHeader.SIZE, length_bytes, CpuidEntry.SIZE):
        entry = CpuidEntry.from_bytes(table[start : start + CpuidEntry.SIZE])
        out += corrected_entry(machine, entry).to_bytes()
    return bytes(out) + table[length_bytes:]


def build_table(entries: tuple[tuple[int, int, tuple[int, int, int, int]], ...], length_bytes: int) -> bytes:
    """A table of (function, subfunction, registers), padded with zeros to `length_bytes`."""
    rows = b"".join(
        CpuidEntry.build(eax_in=leaf, ecx_in=subleaf, **dict(zip(REGISTERS, values, strict=True)))
        for leaf, subleaf, values in entries
    )
    return (CpuidHeader.build(count=len(entries)) + rows).ljust(length_bytes, b"\0")
