"""Argument structures of Hyper-V calls."""

from __future__ import annotations

from sevlab.core.layout import Layout, array, raw_bytes, u8, u32, u64


class HvFlush(Layout, size=24):
    """HvFlushVirtualAddressSpace and List."""

    address_space = u64(0)
    flags = u64(8)
    vcpu_mask = u64(16)


class HvFlushEx(Layout, size=32):
    """The Ex forms; the banks follow."""

    address_space = u64(0)
    flags = u64(8)
    set_format = u64(16, doc="0 sparse, 1 all")
    valid_bank_mask = u64(24)


class HvReferenceTsc(Layout, size=24):
    """The head of the page of the reference TSC: 100-ns units = tsc * scale >> 64, plus offset."""

    tsc_sequence = u32(0, doc="0: not to be used")
    tsc_scale = u64(8)
    tsc_offset = u64(16, doc="signed")


class HvSendIpi(Layout, size=16):
    """HvSendSyntheticClusterIpi."""

    vector = u32(0)
    target_vtl = u8(4)
    reserved_zero = raw_bytes(5, 3)
    vcpu_mask = u64(8)


class HvSendIpiEx(Layout, size=24):
    """HvSendSyntheticClusterIpiEx; the banks follow."""

    vector = u32(0)
    target_vtl = u8(4)
    reserved_zero = raw_bytes(5, 3)
    set_format = u64(8)
    valid_bank_mask = u64(16)


class BankContents(Layout, size=512):
    """The banks of a sparse set of virtual processors; one for each bit of the mask, at most 64."""

    bank = array(0, 64, u64)


LAYOUTS: tuple[type[Layout], ...] = (
    HvFlush,
    HvFlushEx,
    HvSendIpi,
    HvSendIpiEx,
    BankContents,
    HvReferenceTsc,
)
