"""From a vCPU's registers to the bytes of its VMSA and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.cpu import GPR_NAMES, SEGMENT_NAMES
from sevlab.plugins.sev_es.vmsa import Vmsa, segment_bytes, segment_of

if TYPE_CHECKING:
    from sevlab.core.cpu import Vcpu

GENERAL = (*GPR_NAMES, "rip", "rflags")
SYSTEM = (
    "cpl", "efer", "xss", "cr4", "cr3", "cr0", "dr7", "dr6", "star", "lstar", "cstar", "sfmask", "kernel_gs_base",
    "sysenter_cs", "sysenter_esp", "sysenter_eip", "cr2", "g_pat", "tsc_aux", "xcr0",
)  # fmt: skip
DEBUG_ADDRESSES = ("dr0", "dr1", "dr2", "dr3")
XMM_BYTES = 16


def state_bytes(vcpu: Vcpu, before: bytes) -> bytes:
    """The VMSA with the vCPU's present registers; what the model does not keep stays as in `before` (4096 bytes)."""
    regs, system = vcpu.regs, vcpu.system
    fields: dict[str, int | bytes] = {name: getattr(regs, name) for name in GENERAL}
    fields |= {name: getattr(system, name) for name in SYSTEM}
    fields |= {name: segment_bytes(getattr(system, name)) for name in SEGMENT_NAMES}
    fields |= dict(zip(DEBUG_ADDRESSES, system.debug_addresses, strict=True))
    fields["tsc_aux"] = system.tsc_aux & 0xFFFF_FFFF
    fields["cpl"] = system.cpl & 0xFF
    fields["fpreg_xmm"] = b"".join(value.to_bytes(XMM_BYTES, "little") for value in system.xmm)
    return Vmsa.from_bytes(before).replace(**fields).to_bytes()


def load_state(vcpu: Vcpu, page: bytes) -> None:
    """Give the vCPU the registers of a VMSA. Source: 24593, 15.35.5 (VMRUN loads the whole save area)."""
    area = Vmsa.from_bytes(page)
    regs, system = vcpu.regs, vcpu.system
    for name in GENERAL:
        setattr(regs, name, getattr(area, name))
    for name in SYSTEM:
        setattr(system, name, getattr(area, name))
    for name in SEGMENT_NAMES:
        setattr(system, name, segment_of(getattr(area, name)))
    system.debug_addresses = tuple(getattr(area, name) for name in DEBUG_ADDRESSES)
    xmm = area.fpreg_xmm
    system.xmm = tuple(int.from_bytes(xmm[start : start + XMM_BYTES], "little") for start in range(0, 256, XMM_BYTES))
