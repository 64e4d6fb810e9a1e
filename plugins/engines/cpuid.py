"""The processor that guests of an engine see: what Unicorn's CPU can execute, under the name of an EPYC.

A leaf that is not here reads 0. There is no XSAVE and no AVX (the engine's QEMU has neither), no machine
check (no registers behind it), no PCID, and no SMAP: the engine's model lacks STAC and CLAC.
Source: spec 24594 (APM volume 3), appendix E; the bits that the Opteron G5 of unicorn 2.1.4 implements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sevlab.core.builder import PluginBuilder

SIGNATURE = 0x0083_0F10
"""Family 17h model 31h."""
LAST_BASIC, LAST_EXTENDED = 7, 0x8000_001F
VENDOR = b"AuthenticAMD"
BRAND = b"AMD EPYC as sevlab executes it".ljust(48, b"\0")

FEATURES_EDX = sum(1 << bit for bit in (0, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 15, 16, 19, 23, 24, 25, 26))
"""FPU DE PSE TSC MSR PAE CX8 APIC SEP MTRR PGE CMOV PAT CLFSH MMX FXSR SSE SSE2."""
FEATURES_ECX = sum(1 << bit for bit in (0, 9, 13, 19, 20, 23, 24, 30, 31))
"""SSE3 SSSE3 CX16 SSE4.1 SSE4.2 POPCNT TSC-deadline RDRAND, and bit 31: a hypervisor."""
X2APIC = 1 << 21
SMEP = 1 << 7
EXTENDED_EDX = sum(1 << bit for bit in (11, 20, 26, 27, 29)) | FEATURES_EDX & 0x0183_F3FF & ~(1 << 11)
"""SYSCALL NX 1-GiB pages RDTSCP LM, and the old copies of the basic bits."""
INVARIANT_TSC = 1 << 8
LAHF = 1 << 0


def words(text: bytes) -> tuple[int, ...]:
    """Little-endian 32-bit words."""
    return tuple(int.from_bytes(text[at : at + 4], "little") for at in range(0, len(text), 4))


def register(builder: PluginBuilder, *, physical_bits: int) -> None:
    """Put the leaves into the machine."""
    ebx, edx, ecx = words(VENDOR)
    for leaf, last in ((0, LAST_BASIC), (0x8000_0000, LAST_EXTENDED)):
        builder.cpuid_bits(leaf, eax=last, ebx=ebx, ecx=ecx, edx=edx)
    x2apic = X2APIC if builder.options["x2apic"] else 0
    builder.cpuid_bits(1, eax=SIGNATURE, ebx=1 << 16 | 8 << 8, ecx=FEATURES_ECX | x2apic, edx=FEATURES_EDX)
    builder.cpuid_bits(7, ebx=SMEP)
    builder.cpuid_bits(0x8000_0001, eax=SIGNATURE, ecx=LAHF, edx=EXTENDED_EDX)
    for number in range(3):
        eax, ebx, ecx, edx = words(BRAND[number * 16 : number * 16 + 16])
        builder.cpuid_bits(0x8000_0002 + number, eax=eax, ebx=ebx, ecx=ecx, edx=edx)
    builder.cpuid_bits(0x8000_0007, edx=INVARIANT_TSC)
    builder.cpuid_bits(0x8000_0008, eax=48 << 8 | physical_bits)
