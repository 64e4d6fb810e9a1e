"""Arithmetic with flags, on numbers of 8 to 64 bits. Source: spec 24594 (APM volume 3), each instruction's page."""

from __future__ import annotations

from typing import NamedTuple

CF, PF, AF, ZF, SF, OF = 1 << 0, 1 << 2, 1 << 4, 1 << 6, 1 << 7, 1 << 11
DF = 1 << 10
ARITHMETIC = CF | PF | AF | ZF | SF | OF


class Computed(NamedTuple):
    """A result of `bits` width, the flags it sets, and which flags it decides (the others stay)."""

    value: int
    flags: int
    decides: int


def _common(value: int, bits: int) -> int:
    flags = ZF if value == 0 else 0
    flags |= SF if value >> bits - 1 & 1 else 0
    return flags | (PF if (value & 0xFF).bit_count() % 2 == 0 else 0)


def add(left: int, right: int, bits: int, carry: int = 0) -> Computed:
    """Left + right + carry."""
    total = left + right + carry
    value = total & (1 << bits) - 1
    flags = _common(value, bits) | (CF if total >> bits else 0)
    flags |= AF if (left ^ right ^ value) & 0x10 else 0
    flags |= OF if ~(left ^ right) & (left ^ value) & 1 << bits - 1 else 0
    return Computed(value, flags, ARITHMETIC)


def subtract(left: int, right: int, bits: int, borrow: int = 0) -> Computed:
    """Left - right - borrow."""
    value = (left - right - borrow) & (1 << bits) - 1
    flags = _common(value, bits) | (CF if left < right + borrow else 0)
    flags |= AF if (left ^ right ^ value) & 0x10 else 0
    flags |= OF if (left ^ right) & (left ^ value) & 1 << bits - 1 else 0
    return Computed(value, flags, ARITHMETIC)


def logic(value: int, bits: int) -> Computed:
    """Flags of AND, OR, XOR, TEST: CF and OF are 0, AF is undefined and left alone."""
    return Computed(value, _common(value, bits), ARITHMETIC & ~AF)


def increment(value: int, bits: int) -> Computed:
    """Value + 1; CF stays."""
    result = add(value, 1, bits)
    return Computed(result.value, result.flags & ~CF, ARITHMETIC & ~CF)


def decrement(value: int, bits: int) -> Computed:
    """Value - 1; CF stays."""
    result = subtract(value, 1, bits)
    return Computed(result.value, result.flags & ~CF, ARITHMETIC & ~CF)


def shift(mnemonic: str, value: int, count: int, bits: int, carry: int) -> Computed:
    """SHL, SHR, SAR, ROL, ROR, RCL, RCR; `count` is masked to 5 bits (6 for 64-bit operands)."""
    count &= 0x3F if bits == 64 else 0x1F
    mask = (1 << bits) - 1
    if not count:
        return Computed(value, 0, 0)
    top = bits - 1
    if mnemonic in ("shl", "sal"):
        wide = value << count
        result = wide & mask
        flags = (CF if wide >> bits & 1 else 0) | _common(result, bits)
        flags |= OF if (result >> top ^ wide >> bits) & 1 else 0
        return Computed(result, flags, ARITHMETIC & ~AF & ~(OF if count > 1 else 0) & ~(CF if count > bits else 0))
    if mnemonic == "shr":
        result = value >> count
        flags = (CF if value >> count - 1 & 1 else 0) | _common(result, bits) | (OF if value >> top & 1 else 0)
        return Computed(result, flags, ARITHMETIC & ~AF & ~(OF if count > 1 else 0) & ~(CF if count > bits else 0))
    if mnemonic == "sar":
        signed = value - (1 << bits) if value >> top else value
        result = signed >> count & mask
        flags = (CF if signed >> count - 1 & 1 else 0) | _common(result, bits)
        return Computed(result, flags, ARITHMETIC & ~AF & ~(OF if count > 1 else 0))
    return _rotate(mnemonic, value, count, bits, carry)


def _rotate(mnemonic: str, value: int, count: int, bits: int, carry: int) -> Computed:
    top = bits - 1
    decides = CF | (OF if count == 1 else 0)
    if mnemonic in ("rol", "ror"):
        turns = count % bits if mnemonic == "rol" else -count % bits
        result = (value << turns | value >> bits - turns) & (1 << bits) - 1 if turns else value
        out = result & 1 if mnemonic == "rol" else result >> top & 1
    else:
        wide = bits + 1
        turns = count % wide if mnemonic == "rcl" else -count % wide
        if not count % wide:
            return Computed(value, 0, 0)
        whole = carry << bits | value
        whole = (whole << turns | whole >> wide - turns) & (1 << wide) - 1
        result, out = whole & (1 << bits) - 1, whole >> bits
    overflow = result >> top ^ (out if mnemonic in ("rol", "rcl") else result >> top - 1)
    return Computed(result, (CF if out else 0) | (OF if overflow & 1 else 0), decides)


def double_shift(mnemonic: str, value: int, filler: int, count: int, bits: int) -> Computed:
    """SHLD and SHRD; with 16-bit operands a count above 16 is undefined and does nothing here."""
    count &= 0x3F if bits == 64 else 0x1F
    if not count or count > bits:
        return Computed(value, 0, 0)
    mask = (1 << bits) - 1
    if mnemonic == "shld":
        result = (value << count | filler >> bits - count) & mask
        out = value >> bits - count & 1
    else:
        result = (value >> count | filler << bits - count) & mask
        out = value >> count - 1 & 1
    flags = (CF if out else 0) | _common(result, bits) | (OF if (value ^ result) >> bits - 1 & 1 else 0)
    return Computed(result, flags, ARITHMETIC & ~AF & ~(OF if count > 1 else 0))


def sign_extend(value: int, from_bits: int, to_bits: int) -> int:
    """`value` of `from_bits` width with its sign in `to_bits`."""
    return value - (1 << from_bits) & (1 << to_bits) - 1 if value >> from_bits - 1 & 1 else value
