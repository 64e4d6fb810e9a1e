"""CPUID signatures of QEMU's EPYC models, which KVM leaves in the initial RDX.

Source: QEMU target/i386/cpu.c (builtin_x86_defs); 25481, CPUID Fn0000_0001_EAX.
"""

from __future__ import annotations

from sevlab.core.errors import ConfigError


def vcpu_signature(family: int, model: int, stepping: int) -> int:
    """CPUID 1 EAX of a processor. Raises `ConfigError` for numbers that it cannot hold."""
    for name, number, maximum in (("family", family, 0x10E), ("model", model, 0xFF), ("stepping", stepping, 0xF)):
        if not 0 <= number <= maximum:
            raise ConfigError(f"vCPU {name} {number}: expected 0 to {maximum}")
    base, extended = min(family, 0xF), max(family - 0xF, 0)
    return extended << 20 | model >> 4 << 16 | base << 8 | (model & 0xF) << 4 | stepping


_MODELS = {
    (23, 1, 2): ("EPYC", "EPYC-v1", "EPYC-v2", "EPYC-IBPB", "EPYC-v3", "EPYC-v4"),
    (23, 49, 0): ("EPYC-Rome", "EPYC-Rome-v1", "EPYC-Rome-v2", "EPYC-Rome-v3"),
    (25, 1, 1): ("EPYC-Milan", "EPYC-Milan-v1", "EPYC-Milan-v2"),
    (25, 17, 0): ("EPYC-Genoa", "EPYC-Genoa-v1"),
    (26, 0, 0): ("EPYC-Turin",),
}

VCPU_TYPES = {name: vcpu_signature(*numbers) for numbers, names in _MODELS.items() for name in names}
"""Signature by the name of the model."""
