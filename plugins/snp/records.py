"""Steps and outcomes of SNP: the RMP's instructions, as their registers have it."""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.vocabulary import Boundary, Checked, Input, outcome, step


@step("snp.rmpupdate", Boundary.MEMORY)
class RmpUpdate(NamedTuple):
    """The host executes RMPUPDATE: `rax` the page's SPA, `state` the 16 bytes at RCX (`RmpState`)."""

    rax: Input[int]
    state: Input[bytes]


@step("snp.psmash", Boundary.MEMORY)
class Psmash(NamedTuple):
    """The host executes PSMASH: `rax` the SPA of a 2 MiB page."""

    rax: Input[int]


@step("snp.rmpread", Boundary.MEMORY)
class RmpRead(NamedTuple):
    """The host executes RMPREAD: `rax` the page's SPA."""

    rax: Input[int]


@step("snp.pvalidate", Boundary.MEMORY)
class Pvalidate(NamedTuple):
    """A guest executes PVALIDATE: `rax` linear address, `ecx` page size (1: 2 MiB), `edx` bit 0: validate."""

    vcpu: Input[int]
    rax: Input[int]
    ecx: Input[int]
    edx: Input[int]


@step("snp.rmpadjust", Boundary.MEMORY)
class RmpAdjust(NamedTuple):
    """A guest executes RMPADJUST: `rax` linear address, `rcx` page size, `rdx` VMPL [7:0], rights [15:8], VMSA 16."""

    vcpu: Input[int]
    rax: Input[int]
    rcx: Input[int]
    rdx: Input[int]


@step("snp.rmpquery", Boundary.MEMORY)
class RmpQuery(NamedTuple):
    """A guest executes RMPQUERY: `rax` linear address, `rcx` VMPL."""

    vcpu: Input[int]
    rax: Input[int]
    rcx: Input[int]


@outcome("snp.result", Boundary.MEMORY)
class RmpResult(NamedTuple):
    """What an RMP instruction leaves: RAX, and rFLAGS.CF (PVALIDATE: nothing changed)."""

    rax: Checked[int]
    carry: Checked[bool]


@outcome("snp.query", Boundary.MEMORY)
class RmpQueried(NamedTuple):
    """What RMPQUERY found: permissions [15:8] and VMSA bit 16 as RDX, page size as RCX."""

    rdx: Checked[int]
    rcx: Checked[int]


RMP_RECORDS: tuple[type, ...] = (
    RmpUpdate,
    Psmash,
    RmpRead,
    Pvalidate,
    RmpAdjust,
    RmpQuery,
    RmpResult,
    RmpQueried,
)

ENCODINGS = {
    "pvalidate": b"\xf2\x0f\x01\xff",
    "rmpadjust": b"\xf3\x0f\x01\xfe",
    "rmpquery": b"\xf3\x0f\x01\xfd",
    "rmpupdate": b"\xf2\x0f\x01\xfe",
    "psmash": b"\xf3\x0f\x01\xff",
    "rmpread": b"\xf2\x0f\x01\xfd",
}
"""The bytes of the instructions; RMPQUERY's are UNVERIFIED.

Source: Linux arch/x86/include/asm/sev.h; coconut-svsm kernel/src/sev/utils.rs.
"""
