"""What a VMSA holds when a guest is launched: one row for each hypervisor, kernel era and purpose.

The measurement covers these bytes, so each profile is a fact about a program: QEMU or another VMM on KVM, and what the
kernel of the time copied into the VMSA's FPU area.
Source: virtee sev-snp-measure 0.0.13 sevsnpmeasure/vmsa.py; Linux arch/x86/kvm/svm/sev.c (sev_es_sync_vmsa) and
arch/x86/coco/sev/core.c (wakeup_cpu_via_vmgexit); the VMSA pages that sevctl publishes (a kernel of 2022).
"""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.cpu import SEGMENT_NAMES, Segment
from sevlab.plugins.sev_es.vmsa import Vmsa, segment_bytes

RESET_EIP = 0xFFFF_FFF0
"""Where the boot processor starts."""

EFER_SVME = 0x1000
CR4_MCE = 0x40
PAT_RESET = 0x0007_0406_0007_0406
PAT_GCE = 0x0000_0000_0007_0106
MXCSR_RESET = 0x1F80
FCW_KVM = 0x37F


class VmsaProfile(NamedTuple):
    """Initial values that differ; attributes in the VMCB's 12-bit format, `rdx` None: the CPU's signature.

    `cs_boot` is the code segment's attributes of the boot processor. `flat`: 32-bit protected mode from the first
    instruction, with the whole of `eip` in RIP, as an SVSM starts.
    """

    name: str
    doc: str
    cs: int = 0x9B
    cs_boot: int = 0x9B
    ss: int = 0x93
    tr: int = 0x8B
    rdx: int | None = None
    g_pat: int = PAT_RESET
    mxcsr: int = MXCSR_RESET
    fcw: int = FCW_KVM
    flat: bool = False


PROFILES: dict[str, VmsaProfile] = {
    profile.name: profile
    for profile in (
        VmsaProfile("qemu", "QEMU on KVM since the FPU state is copied (2024)"),
        VmsaProfile("qemu-2022", "QEMU on KVM before: the FPU area is zero", mxcsr=0, fcw=0),
        VmsaProfile("gce", "Google Compute Engine", rdx=0x600, g_pat=PAT_GCE, mxcsr=0, fcw=0),
        VmsaProfile("ec2", "Amazon EC2", cs_boot=0x9A, ss=0x92, tr=0x83, rdx=0, mxcsr=0, fcw=0),
        VmsaProfile("svsm", "Coconut-SVSM started by QEMU on KVM", fcw=0, flat=True),
    )
}
"""By name. Of `ec2` two published tools disagree about RDX (0 or 600h): UNVERIFIED."""

FLAT_CODE: Segment = (8, 0xC9B, 0xFFFF_FFFF, 0)
FLAT_DATA: Segment = (16, 0xC93, 0xFFFF_FFFF, 0)


def initial_vmsa(
    profile: str | VmsaProfile = "qemu", *, eip: int = RESET_EIP, sev_features: int = 0, vcpu_signature: int = 0
) -> bytes:
    """The 4096 bytes of a VMSA at launch.

    `eip`: 32-bit address of the first instruction, split into CS base and RIP as a reset does; `sev_features`: 64 bits,
    0 for SEV-ES; `vcpu_signature`: CPUID 1 EAX, which KVM puts into RDX.
    Raises `KeyError` for a profile name that does not exist.
    """
    row = PROFILES[profile] if isinstance(profile, str) else profile
    segments = _flat_segments(row) if row.flat else _real_mode_segments(row, eip)
    return Vmsa.build(
        **{name: segment_bytes(segments[name]) for name in SEGMENT_NAMES},
        efer=EFER_SVME,
        cr4=CR4_MCE,
        cr0=0x11 if row.flat else 0x10,
        dr7=0x400,
        dr6=0xFFFF_0FF0,
        rflags=2,
        rip=eip if row.flat else eip & 0xFFFF,
        g_pat=row.g_pat,
        rdx=vcpu_signature if row.rdx is None else row.rdx,
        sev_features=sev_features,
        xcr0=1,
        mxcsr=row.mxcsr,
        x87_fcw=row.fcw,
    )


def _real_mode_segments(row: VmsaProfile, eip: int) -> dict[str, Segment]:
    code = row.cs_boot if eip == RESET_EIP else row.cs
    return dict.fromkeys(SEGMENT_NAMES, (0, 0x93, 0xFFFF, 0)) | {
        "cs": (0xF000, code, 0xFFFF, eip & 0xFFFF_0000),
        "ss": (0, row.ss, 0xFFFF, 0),
        "gdtr": (0, 0, 0xFFFF, 0),
        "idtr": (0, 0, 0xFFFF, 0),
        "ldtr": (0, 0x82, 0xFFFF, 0),
        "tr": (0, row.tr, 0xFFFF, 0),
    }


def _flat_segments(row: VmsaProfile) -> dict[str, Segment]:
    return dict.fromkeys(("es", "ss", "ds", "fs"), FLAT_DATA) | {
        "cs": FLAT_CODE,
        "gs": (0, 0x93, 0xFFFF, 0),
        "gdtr": (0, 0, 0xFFFF, 0),
        "idtr": (0, 0, 0xFFFF, 0),
        "ldtr": (0, 0x82, 0xFFFF, 0),
        "tr": (0, row.tr, 0xFFFF, 0),
    }
