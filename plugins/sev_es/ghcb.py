"""The GHCB page: its layout, and the numbers that go in and out of it.

Source: 56421 (GHCB), sections 2 and 4; Linux arch/x86/include/asm/svm.h (struct ghcb) and asm/sev-common.h; edk2
MdePkg/Include/Register/Amd/Ghcb.h; coconut-svsm kernel/src/sev/ghcb.rs.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

from sevlab.core.layout import Layout, raw_bytes, u8, u16, u32, u64
from sevlab.core.layout_fields import VALID_BIT_SPAN_BYTES

SECTION = "56421, GHCB layout"

SHARED_BUFFER_OFFSET = 0x800
SHARED_BUFFER_BYTES = 0x7F0
"""The scratch area inside the page: 2032 bytes."""


class Ghcb(Layout, size=4096, valid_bitmap=0x3F0):
    """GHCB page: what a guest shows its hypervisor at a VMGEXIT, and what it gets back."""

    cpl = u8(0x0CB, valid_bit=True, doc="CPL of the code that exits", source=SECTION)
    xss = u64(0x140, valid_bit=True, doc="for CPUID 0Dh, subleaf 1", source=SECTION)
    dr7 = u64(0x160, valid_bit=True, source=SECTION)
    rip = u64(0x178, valid_bit=True, doc="named by Linux only", source="Linux arch/x86/include/asm/svm.h")
    rsp = u64(0x1D8, valid_bit=True, doc="named by Linux only", source="Linux arch/x86/include/asm/svm.h")
    rax = u64(0x1F8, valid_bit=True, source=SECTION)
    rcx = u64(0x308, valid_bit=True, source=SECTION)
    rdx = u64(0x310, valid_bit=True, source=SECTION)
    rbx = u64(0x318, valid_bit=True, source=SECTION)
    rbp = u64(0x328, valid_bit=True, source=SECTION)
    rsi = u64(0x330, valid_bit=True, source=SECTION)
    rdi = u64(0x338, valid_bit=True, source=SECTION)
    r8 = u64(0x340, valid_bit=True, source=SECTION)
    r9 = u64(0x348, valid_bit=True, source=SECTION)
    r10 = u64(0x350, valid_bit=True, source=SECTION)
    r11 = u64(0x358, valid_bit=True, source=SECTION)
    r12 = u64(0x360, valid_bit=True, source=SECTION)
    r13 = u64(0x368, valid_bit=True, source=SECTION)
    r14 = u64(0x370, valid_bit=True, source=SECTION)
    r15 = u64(0x378, valid_bit=True, source=SECTION)
    sw_exit_code = u64(0x390, valid_bit=True, doc="the NAE event", source=SECTION)
    sw_exit_info_1 = u64(0x398, valid_bit=True, doc="argument in, result out", source=SECTION)
    sw_exit_info_2 = u64(0x3A0, valid_bit=True, doc="argument in, exception, result or reason out", source=SECTION)
    sw_scratch = u64(0x3A8, valid_bit=True, doc="GPA of the scratch area", source=SECTION)
    xcr0 = u64(0x3E8, valid_bit=True, doc="for CPUID 0Dh", source=SECTION)
    valid_bitmap = raw_bytes(0x3F0, 16, doc="bit n: the eight bytes at 8 n are valid", source=SECTION)
    x87_state_gpa = u64(0x400, doc="used by nobody known", source=SECTION)
    shared_buffer = raw_bytes(SHARED_BUFFER_OFFSET, SHARED_BUFFER_BYTES, source=SECTION)
    protocol_version = u16(0xFFA, doc="the version that was negotiated", source=SECTION)
    ghcb_usage = u32(0xFFC, doc="0: this layout", source=SECTION)


VALID_BITS: dict[str, int] = {
    name: 1 << info.offset // VALID_BIT_SPAN_BYTES for name, info in Ghcb.FIELDS.items() if info.valid_bit
}
"""The valid bit of each field, as a mask of the 128-bit bitmap read as a little-endian number."""


def valid_mask(*fields: str) -> int:
    """The valid bits of `fields`, together. Raises `KeyError` for a field that has none."""
    mask = 0
    for name in fields:
        mask |= VALID_BITS[name]
    return mask


class Result(IntEnum):
    """What SW_EXITINFO1 says after a VMGEXIT. Source: 56421, 4.1."""

    DONE = 0
    EXCEPTION = 1
    MALFORMED = 2


class Reason(IntEnum):
    """SW_EXITINFO2 when the result is MALFORMED. Source: 56421, 4.1; Linux asm/sev-common.h (GHCB_ERR_*)."""

    NOT_REGISTERED = 1
    INVALID_USAGE = 2
    INVALID_SCRATCH = 3
    MISSING_INPUT = 4
    INVALID_INPUT = 5
    INVALID_EVENT = 6


class Usage(IntEnum):
    """GHCB_USAGE. Source: 56421, GHCB layout; openvmm vm/x86/x86defs/src/snp.rs."""

    STANDARD = 0
    HYPERV_HYPERCALL = 1
    HYPERV_VTL_RETURN = 2
    HYPERV_INVALID = 0xFFFF_FFFF


class NaeCode(IntEnum):
    """SW_EXITCODE values beyond the hardware's exit codes. Source: Linux arch/x86/include/uapi/asm/svm.h."""

    MMIO_READ = 0x8000_0001
    MMIO_WRITE = 0x8000_0002
    NMI_COMPLETE = 0x8000_0003
    AP_RESET_HOLD = 0x8000_0004
    AP_JUMP_TABLE = 0x8000_0005
    SNP_PAGE_STATE_CHANGE = 0x8000_0010
    SNP_GUEST_REQUEST = 0x8000_0011
    SNP_EXTENDED_GUEST_REQUEST = 0x8000_0012
    SNP_AP_CREATION = 0x8000_0013
    HV_DOORBELL = 0x8000_0014
    HV_IPI = 0x8000_0015
    HV_TIMER = 0x8000_0016
    APIC_ID_LIST = 0x8000_0017
    SNP_RUN_VMPL = 0x8000_0018
    SECURE_AVIC = 0x8000_001A
    CONFIGURE_INTERRUPT_INJECTION = 0x8000_001B
    DISABLE_ALTERNATE_INJECTION = 0x8000_001C
    SPECIFIC_EOI = 0x8000_001D
    HV_FEATURES = 0x8000_FFFD
    TERMINATION = 0x8000_FFFE
    UNSUPPORTED = 0x8000_FFFF


class HvFeature(IntFlag):
    """Hypervisor features. Source: 56421, hypervisor features; coconut-svsm kernel/src/sev/ghcb.rs."""

    SNP = 1 << 0
    SNP_AP_CREATION = 1 << 1
    RESTRICTED_INJECTION = 1 << 2
    RESTRICTED_INJECTION_TIMER = 1 << 3
    APIC_ID_LIST = 1 << 4
    MULTIPLE_VMPLS = 1 << 5
    PAGE_STATE_CHANGE = 1 << 6
    EXTENDED_INTERRUPTS = 1 << 9


PROTOCOL_MIN, PROTOCOL_MAX = 1, 2
"""Protocol versions on the wire; revisions 2.00 to 2.04 of the document are all version 2."""
