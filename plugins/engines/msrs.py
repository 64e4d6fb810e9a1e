"""Registers that kernels expect of an AMD processor and that no device of the model needs: MTRRs and a few of AMD's.

An MTRR holds what is written to it: the model's memory has no types. Without them Linux does not set up PAT, and
without PAT an encrypted one cannot map memory to change its encryption.
Source: spec 24593 (APM volume 2), 7.7; what a hypervisor answers: Linux arch/x86/kvm/svm/svm.c and x86.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from sevlab.core.builder import Msr
from sevlab.core.events import Fault
from sevlab.core.state import StateDict, Stateful, new
from sevlab.core.svm import Vector

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

GP = Fault(Vector.GP, 0, 0)
CAPABILITIES, DEFAULT_TYPE = 0xFE, 0x2FF
VARIABLE = range(0x200, 0x210)
FIXED = (0x250, 0x258, 0x259, *range(0x268, 0x270))
EIGHT_VARIABLE_AND_FIXED = 0x508
WRITE_BACK_ON = 0xC06
"""MTRRs and fixed ranges on, everything else write-back: what firmware leaves."""
TYPES = frozenset((0, 1, 4, 5, 6))
SYSCFG, HWCR, NB_CFG, LS_CFG, DE_CFG, PATCH_LEVEL = (
    0xC001_0010,
    0xC001_0015,
    0xC001_001F,
    0xC001_1020,
    0xC001_1029,
    0x8B,
)
QUIET = {SYSCFG: 0, HWCR: 1 << 24, NB_CFG: 0, LS_CFG: 0, DE_CFG: 1 << 1, PATCH_LEVEL: 0x0830_107C}
"""What reads give; writes are dropped. HWCR bit 24: the TSC counts at the rate of P0."""


class ProcessorMsrs(Stateful):
    """MTRRs by (vCPU, register)."""

    values: StateDict[tuple[int, int], int] = new(StateDict)


def _state(machine: Machine) -> ProcessorMsrs:
    return cast("ProcessorMsrs", machine.components["engines"])


def _read(machine: Machine, vcpu: Vcpu | None, number: int) -> int | Fault:
    if vcpu is None:
        return GP
    default = WRITE_BACK_ON if number == DEFAULT_TYPE else 0
    return _state(machine).values.get((vcpu.vcpu_id, number), default)


def _write(machine: Machine, vcpu: Vcpu | None, number: int, value: int) -> Fault | None:
    """Types that do not exist are #GP(0)."""
    if vcpu is None or not _legal(number, value):
        return GP
    _state(machine).values[vcpu.vcpu_id, number] = value
    return None


def _legal(number: int, value: int) -> bool:
    if number in FIXED:
        return all(byte in TYPES for byte in value.to_bytes(8, "little"))
    if number == DEFAULT_TYPE:
        return not value & ~0xCFF and value & 0xFF in TYPES
    return bool(number & 1) or value & 0xFF in TYPES


def _read_quiet(_machine: Machine, vcpu: Vcpu | None, number: int) -> int | Fault:
    return GP if vcpu is None else QUIET[number]


def register(builder: PluginBuilder) -> None:
    """Put the registers into the machine."""
    builder.component(ProcessorMsrs())
    builder.guest_msrs.add(CAPABILITIES, Msr(lambda _m, _v, _n: EIGHT_VARIABLE_AND_FIXED, None))
    for number in (*VARIABLE, *FIXED, DEFAULT_TYPE):
        builder.guest_msrs.add(number, Msr(_read, _write))
    for number in QUIET:
        builder.guest_msrs.add(number, Msr(_read_quiet, lambda _m, _v, _n, _value: None))
