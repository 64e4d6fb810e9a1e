"""Words that exits carry: EXITINFO1 of IOIO, and events. A hypervisor and a guest's #VC handler speak them both."""

from __future__ import annotations

from sevlab.core.layout import Layout, bits, flag, u32, u64


class IoioInfo(Layout, size=8):
    """EXITINFO1 of an IOIO exit; the GHCB uses the same format."""

    direction = flag(0, u64, 0, doc="1: IN", source="24593, 15.10.2")
    string = flag(0, u64, 2, doc="INS or OUTS", source="24593, 15.10.2")
    rep = flag(0, u64, 3, source="24593, 15.10.2")
    size = bits(0, u64, 6, 4, values=(1, 2, 4), doc="bytes", source="24593, 15.10.2")
    address_16 = flag(0, u64, 7, source="24593, 15.10.2")
    address_32 = flag(0, u64, 8, source="24593, 15.10.2")
    address_64 = flag(0, u64, 9, source="24593, 15.10.2")
    segment = bits(0, u64, 12, 10, doc="0 ES, 1 CS, 2 SS, 3 DS, 4 FS, 5 GS", source="24593, 15.10.2")
    port = bits(0, u64, 31, 16, source="24593, 15.10.2")


IOIO_IN, IOIO_STRING, IOIO_REP = 1 << 0, 1 << 2, 1 << 3


class EventWord(Layout, size=8):
    """EVENTINJ, EXITINTINFO, and the exception word of a GHCB reply."""

    vector = bits(0, u32, 7, 0, source="24593, 15.20")
    kind = bits(
        0, u32, 10, 8, values=(0, 2, 3, 4), doc="0 interrupt, 2 NMI, 3 exception, 4 INTn", source="24593, 15.20"
    )
    error_valid = flag(0, u32, 11, source="24593, 15.20")
    reserved_30_12 = bits(0, u32, 30, 12, must_be_zero=True, source="24593, 15.20")
    valid = flag(0, u32, 31, source="24593, 15.20")
    error_code = bits(4, u32, 31, 0, source="24593, 15.20")


SEGMENT_NUMBERS = {"ES": 0, "CS": 1, "SS": 2, "DS": 3, "FS": 4, "GS": 5}
ADDRESS_BITS = {16: 1 << 7, 32: 1 << 8, 64: 1 << 9}


def ioio_word(
    port: int,
    size: int,
    *,
    is_in: bool,
    string: bool = False,
    rep: bool = False,
    address_size: int = 64,
    segment: int = 0,
) -> int:
    """EXITINFO1 of an IOIO exit: `size` 1, 2 or 4 bytes, `address_size` 16, 32 or 64 bits, `segment` 0 to 5."""
    return port << 16 | segment << 10 | ADDRESS_BITS[address_size] | size << 4 | (rep << 3) | (string << 2) | int(is_in)
