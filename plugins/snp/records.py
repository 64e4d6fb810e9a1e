"""Steps and outcomes of SNP: the RMP's instructions, as their registers have it."""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.vocabulary import Boundary, Checked, Derived, Input, outcome, step


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


# The reference guest --------------------------------------------------------------------------------------------------


@step("snp.set-pages", Boundary.GHCB)
class SetPages(NamedTuple):
    """The reference guest makes `page_count` pages from `gpa` on private or shared: PVALIDATE and page state change.

    `page_size` 1: pages of 2 MiB. Without a GHCB (no `sev_es.vc-setup` yet) it uses the MSR protocol.
    """

    vcpu: Input[int]
    gpa: Input[int]
    page_count: Input[int]
    page_size: Input[int]
    private: Input[bool]


@step("snp.message", Boundary.GHCB)
class SendMessage(NamedTuple):
    """The reference guest sends a message to the firmware: `payload` of `kind` under VMPCK `vmpck`.

    Keys and numbers are in its secrets page at `secrets_gpa`; request and response go through the shared pages at
    `shared_gpa` and behind it; certificates, when `data_pages` is not 0, come to the pages behind those.
    """

    vcpu: Input[int]
    secrets_gpa: Input[int]
    shared_gpa: Input[int]
    vmpck: Input[int]
    kind: Input[int]
    payload: Input[bytes]
    data_pages: Input[int]


@step("snp.create-ap", Boundary.GHCB)
class CreateAp(NamedTuple):
    """The reference guest starts (`request` 0 or 1) or ends (2) vCPU `apic_id` with the save area at `vmsa_gpa`.

    `vmsa` is what it puts there first, 4096 bytes; empty: the page is as it is.
    """

    vcpu: Input[int]
    apic_id: Input[int]
    vmsa_gpa: Input[int]
    request: Input[int]
    vmpl: Input[int]
    vmsa: Input[bytes]


@step("snp.cpuid-page", Boundary.GHCB)
class UseCpuidPage(NamedTuple):
    """The reference guest of a vCPU's VM copies the CPUID page at `cpuid_gpa` and answers CPUID from it from now on."""

    vcpu: Input[int]
    cpuid_gpa: Input[int]


@step("snp.doorbell", Boundary.GHCB)
class SetDoorbell(NamedTuple):
    """The reference guest tells its hypervisor that its #HV doorbell page is the shared page at `gpa`."""

    vcpu: Input[int]
    gpa: Input[int]


@step("snp.hv", Boundary.GHCB)
class TakeHv(NamedTuple):
    """The reference guest's #HV handler: takes what its doorbell page says, above the priority of `tpr`."""

    vcpu: Input[int]
    tpr: Input[int]


@step("snp.hv-ipi", Boundary.GHCB)
class SendHvIpi(NamedTuple):
    """The reference guest sends an interrupt to vCPUs of its own: `icr` is an x2APIC ICR value."""

    vcpu: Input[int]
    icr: Input[int]


@outcome("snp.hv-taken", Boundary.GHCB)
class HvTaken(NamedTuple):
    """What the #HV handler found: `vectors` that it dispatched, those that are `no_interrupts`, and an NMI."""

    vcpu: Derived[int]
    vectors: Checked[tuple[int, ...]]
    no_interrupts: Checked[tuple[int, ...]]
    nmi: Checked[bool]


@outcome("snp.answer", Boundary.GHCB)
class MessageAnswered(NamedTuple):
    """What the reference guest got of the firmware: the payload, opened and checked, and the certificates."""

    payload: Checked[bytes]
    certificates: Checked[bytes]


@outcome("snp.no-answer", Boundary.GHCB)
class MessageFailed(NamedTuple):
    """A message had no good answer; `key_gone`: the guest gave up the VMPCK rather than risk a nonce twice."""

    reason: Checked[str]
    key_gone: Checked[bool]


GUEST_RECORDS: tuple[type, ...] = (
    SetPages,
    SendMessage,
    CreateAp,
    UseCpuidPage,
    SetDoorbell,
    TakeHv,
    SendHvIpi,
    HvTaken,
    MessageAnswered,
    MessageFailed,
)
