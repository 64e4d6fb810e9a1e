"""Hyper-V's own use of the GHCB page: a hypercall when GHCB_USAGE is 1.

The page is then the input, followed by the GPA of the output and the control word, which the status replaces.
Source: openvmm vm/x86/x86defs/src/snp.rs (usage values); Linux arch/x86/hyperv/ivm.c (union hv_ghcb).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.layout import Layout, bits, raw_bytes, u16, u64

if TYPE_CHECKING:
    from sevlab.core.buffers import SharedBuffer
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

STATUS_INVALID_HYPERCALL_CODE = 2
SOURCE = "Linux arch/x86/hyperv/ivm.c (union hv_ghcb)"


class HypervPage(Layout, size=4096):
    """A GHCB page with usage 1."""

    hypercall_data = raw_bytes(0x000, 509 * 8, source=SOURCE)
    output_gpa = u64(0xFE8, source=SOURCE)
    call_code = u16(0xFF0, doc="the status afterwards", source=SOURCE)
    fast = bits(0xFF2, u16, 0, 0, source=SOURCE)
    element_count = bits(0xFF4, u16, 11, 0, source=SOURCE)
    start_index = bits(0xFF6, u16, 11, 0, source=SOURCE)


def hypercall(machine: Machine, vcpu: Vcpu, window: SharedBuffer, page: bytes) -> None:
    """Answer a hypercall: none is implemented, which Hyper-V's ABI has a status for."""
    from sevlab.plugins.sev_es.records import VmgexitIgnored

    code = HypervPage.from_bytes(page).call_code
    window.write_uint(HypervPage.FIELDS["call_code"].offset, 2, STATUS_INVALID_HYPERCALL_CODE)
    machine.emit(VmgexitIgnored(vcpu.vcpu_id, f"Hyper-V hypercall {code:#x}: status invalid hypercall code"))
