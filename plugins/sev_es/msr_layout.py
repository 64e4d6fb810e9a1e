"""The GHCB MSR protocol: every value as a layout of one 64-bit register.

`info` is bits 11:0 and says which layout the rest has. Bits that a layout does not name are reserved: zero.
Source: 56421, section 2.3 (MSR protocol); Linux arch/x86/include/asm/sev-common.h; edk2
MdePkg/Include/Register/Amd/SevSnpMsr.h; coconut-svsm kernel/src/sev/msr_protocol.rs.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from sevlab.core.layout import Layout, bits, u64

MSR_GHCB = 0xC001_0130
MSR_SEV_STATUS = 0xC001_0131

INFO_MASK = 0xFFF
GFN_ALL_ONES = (1 << 52) - 1
"""In a GFN field: no preference, or refused."""

SECTION = "56421, MSR protocol"


class MsrInfo(IntEnum):
    """Bits 11:0 of the GHCB MSR."""

    GHCB_GPA = 0x000
    SEV_INFO_RESPONSE = 0x001
    SEV_INFO_REQUEST = 0x002
    CPUID_REQUEST = 0x004
    CPUID_RESPONSE = 0x005
    AP_RESET_HOLD_REQUEST = 0x006
    AP_RESET_HOLD_RESPONSE = 0x007
    PREFERRED_GPA_REQUEST = 0x010
    PREFERRED_GPA_RESPONSE = 0x011
    REGISTER_GPA_REQUEST = 0x012
    REGISTER_GPA_RESPONSE = 0x013
    PAGE_STATE_REQUEST = 0x014
    PAGE_STATE_RESPONSE = 0x015
    RUN_VMPL_REQUEST = 0x016
    RUN_VMPL_RESPONSE = 0x017
    HV_FEATURES_REQUEST = 0x080
    HV_FEATURES_RESPONSE = 0x081
    TERMINATE_REQUEST = 0x100


def _info() -> Any:
    return bits(0, u64, 11, 0, source=SECTION)


class GhcbGpa(Layout, size=8):
    """The GPA of the GHCB page: the next VMGEXIT uses the page protocol."""

    info = _info()
    gfn = bits(0, u64, 63, 12, source=SECTION)


class SevInfoResponse(Layout, size=8):
    """Protocol versions and C-bit; also what the MSR holds at reset."""

    info = _info()
    reserved_23_12 = bits(0, u64, 23, 12, must_be_zero=True, source=SECTION)
    c_bit = bits(0, u64, 31, 24, source=SECTION)
    version_min = bits(0, u64, 47, 32, source=SECTION)
    version_max = bits(0, u64, 63, 48, source=SECTION)


class NoArgument(Layout, size=8):
    """A request without argument."""

    info = _info()
    reserved_63_12 = bits(0, u64, 63, 12, must_be_zero=True, source=SECTION)


class CpuidRequest(Layout, size=8):
    """One register of one CPUID leaf, subleaf 0."""

    info = _info()
    reserved_29_12 = bits(0, u64, 29, 12, must_be_zero=True, source=SECTION)
    register = bits(0, u64, 31, 30, doc="0 EAX, 1 EBX, 2 ECX, 3 EDX", source=SECTION)
    function = bits(0, u64, 63, 32, source=SECTION)


class CpuidResponse(Layout, size=8):
    """The value of the register, which is repeated."""

    info = _info()
    reserved_29_12 = bits(0, u64, 29, 12, must_be_zero=True, source=SECTION)
    register = bits(0, u64, 31, 30, source=SECTION)
    value = bits(0, u64, 63, 32, source=SECTION)


class AnyData(Layout, size=8):
    """A response whose whole data is a number."""

    info = _info()
    data = bits(0, u64, 63, 12, source=SECTION)


class PageStateRequest(Layout, size=8):
    """Change the state of one 4 KiB page."""

    info = _info()
    gfn = bits(0, u64, 51, 12, source=SECTION)
    operation = bits(0, u64, 55, 52, values=(1, 2), doc="1 private, 2 shared", source=SECTION)
    reserved_63_56 = bits(0, u64, 63, 56, must_be_zero=True, source=SECTION)


class ErrorResponse(Layout, size=8):
    """An error, 0 for success."""

    info = _info()
    reserved_31_12 = bits(0, u64, 31, 12, must_be_zero=True, source=SECTION)
    error = bits(0, u64, 63, 32, source=SECTION)


class RunVmplRequest(Layout, size=8):
    """Run the vCPU at another VMPL."""

    info = _info()
    reserved_31_12 = bits(0, u64, 31, 12, must_be_zero=True, source=SECTION)
    vmpl = bits(0, u64, 39, 32, source=SECTION)
    reserved_63_40 = bits(0, u64, 63, 40, must_be_zero=True, source=SECTION)


class TerminateRequest(Layout, size=8):
    """The guest gives up; there is no response."""

    info = _info()
    reason_set = bits(0, u64, 15, 12, source=SECTION)
    reason_code = bits(0, u64, 23, 16, source=SECTION)
    reserved_63_24 = bits(0, u64, 63, 24, must_be_zero=True, source=SECTION)


LAYOUTS: dict[int, type[Layout]] = {
    MsrInfo.GHCB_GPA: GhcbGpa,
    MsrInfo.SEV_INFO_RESPONSE: SevInfoResponse,
    MsrInfo.SEV_INFO_REQUEST: NoArgument,
    MsrInfo.CPUID_REQUEST: CpuidRequest,
    MsrInfo.CPUID_RESPONSE: CpuidResponse,
    MsrInfo.AP_RESET_HOLD_REQUEST: NoArgument,
    MsrInfo.AP_RESET_HOLD_RESPONSE: AnyData,
    MsrInfo.PREFERRED_GPA_REQUEST: NoArgument,
    MsrInfo.PREFERRED_GPA_RESPONSE: GhcbGpa,
    MsrInfo.REGISTER_GPA_REQUEST: GhcbGpa,
    MsrInfo.REGISTER_GPA_RESPONSE: GhcbGpa,
    MsrInfo.PAGE_STATE_REQUEST: PageStateRequest,
    MsrInfo.PAGE_STATE_RESPONSE: ErrorResponse,
    MsrInfo.RUN_VMPL_REQUEST: RunVmplRequest,
    MsrInfo.RUN_VMPL_RESPONSE: ErrorResponse,
    MsrInfo.HV_FEATURES_REQUEST: NoArgument,
    MsrInfo.HV_FEATURES_RESPONSE: AnyData,
    MsrInfo.TERMINATE_REQUEST: TerminateRequest,
}
"""The layout of every value, by its info."""


class TerminationReason(NamedTuple):
    """One row of the termination reasons."""

    reason_set: int
    code: int
    sender: str
    meaning: str


TERMINATION_REASONS: tuple[TerminationReason, ...] = (
    TerminationReason(0, 0, "any", "general"),
    TerminationReason(0, 1, "any", "protocol version range not supported"),
    TerminationReason(0, 2, "any", "SNP features not supported"),
    TerminationReason(1, 0, "linux", "GHCB registration failed"),
    TerminationReason(1, 1, "linux", "page state change failed"),
    TerminationReason(1, 2, "linux", "PVALIDATE failed"),
    TerminationReason(1, 3, "linux", "not at VMPL0"),
    TerminationReason(1, 4, "linux", "CPUID page"),
    TerminationReason(1, 5, "linux", "CPUID over the hypervisor"),
    TerminationReason(1, 6, "linux", "secrets page"),
    TerminationReason(1, 7, "linux", "no SVSM"),
    TerminationReason(1, 8, "linux", "SVSM at VMPL0"),
    TerminationReason(1, 9, "linux", "SVSM calling area address"),
    TerminationReason(1, 10, "linux", "Secure TSC"),
    TerminationReason(1, 11, "linux", "SVSM calling area remap failed"),
    TerminationReason(1, 12, "linux", "Secure AVIC failed"),
    TerminationReason(1, 1, "ovmf", "#VC was not CPUID"),
    TerminationReason(1, 2, "ovmf", "unexpected response code"),
)
"""Linux and OVMF's reset vector both use set 1 with meanings of their own; the stage of the boot tells them apart.

Source: Linux arch/x86/include/asm/sev-common.h; edk2 OvmfPkg/ResetVector/Ia32/AmdSev.asm.
"""


def build(layout: type[Layout], info: MsrInfo, **fields: int) -> int:
    """The 64-bit value of `layout` with these fields. Raises `LayoutError` for a value that does not fit."""
    return int.from_bytes(layout.build(info=info, **fields), "little")


def decode(value: int) -> Layout | None:
    """The decoded fields of a 64-bit value; None when its info has no layout."""
    layout = LAYOUTS.get(value & INFO_MASK)
    return None if layout is None else layout.from_bytes(value.to_bytes(8, "little"))
