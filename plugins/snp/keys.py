"""VCEK and VLEK: hash sticks by TCB, the signing keys behind them, and a VLEK's journey to the chip.

A key of a lower TCB follows from that of a higher one, never the other way. What the firmware feeds into the first
stick and how it makes a scalar of the last one is not public: both are the model's own. UNVERIFIED.

Source: AMD-ASPFW sev_uapp/src/sev_plat.c (hash sticks) and sev_mcmd.c (VLEK_LOAD).
"""

from __future__ import annotations

from hashlib import sha384
from typing import TYPE_CHECKING

from sevlab.plugins.sev import crypto, sev_state
from sevlab.plugins.snp.buffers import WrappedVlek

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

STICK_BYTES = 48
TCB_BYTES = 8
MAX_SVN = 255
LABEL_SCALAR = b"sev-versioned-endorsement-key"
LABEL_WRAP = b"sev-vlek-wrapping-key"
KEY_BYTES = 32
SCALAR_SEED_BYTES = 56
GCM_TAG_BYTES = 16


def hash_stick(base: bytes, tcb: int) -> bytes:
    """The stick of the last component (microcode) of `tcb`, from the 48-byte secret `base`.

    A component with base B and level v: d is SHA-384 applied 255 - v times to B, its stick SHA-384(d), the base of the
    next one SHA-384 of eight zero bytes and d. Source: AMD-ASPFW sev_uapp/src/sev_plat.c.
    """
    stick = base
    for level in tcb.to_bytes(TCB_BYTES, "little"):
        digest = base
        for _ in range(MAX_SVN - level):
            digest = sha384(digest).digest()
        stick = sha384(digest).digest()
        base = sha384(bytes(8) + digest).digest()
    return stick


def chip_base(machine: Machine) -> bytes:
    """The chip's secret as the first base. UNVERIFIED."""
    return sha384(b"vcek" + sev_state(machine).chip_key).digest()


def vcek_stick(machine: Machine, tcb: int) -> bytes:
    """The chip's stick at `tcb`."""
    return hash_stick(chip_base(machine), tcb)


def signing_scalar(stick: bytes) -> int:
    """The private P-384 key of a stick. UNVERIFIED."""
    return crypto.scalar_from_seed(crypto.kdf(stick, LABEL_SCALAR, b"", SCALAR_SEED_BYTES))


def vlek_sticks(provider_secret: bytes, tcb: int) -> bytes:
    """What AMD's key server wraps for a provider: 180h bytes of which the last 48 are the stick at `tcb`.

    The firmware uses the last; that the others are the components' is UNVERIFIED.
    """
    base = sha384(b"vlek" + provider_secret).digest()
    return b"".join(sha384(base + bytes((n,))).digest() for n in range(7)) + hash_stick(base, tcb)


def wrapping_key(machine: Machine) -> bytes:
    """The key under which the key server wraps a VLEK for this chip. UNVERIFIED."""
    return crypto.kdf(sev_state(machine).chip_key, LABEL_WRAP, b"", KEY_BYTES)


def wrap_vlek(machine: Machine, provider_secret: bytes, tcb: int, iv: bytes) -> bytes:
    """The blob that AMD's key server would make for this chip. Source: Linux include/uapi/linux/psp-sev.h."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    head = WrappedVlek.build(iv=iv, vlek_tcb=tcb)
    sealed = AESGCM(wrapping_key(machine)).encrypt(iv, vlek_sticks(provider_secret, tcb), head[0x190:0x1A0])
    return WrappedVlek.build(iv=iv, vlek_tcb=tcb, wrapped=sealed[:-GCM_TAG_BYTES], tag=sealed[-GCM_TAG_BYTES:])


def unwrap_vlek(machine: Machine, blob: WrappedVlek) -> bytes | None:
    """The stick of a wrapped VLEK; None: BAD_MEASUREMENT. Authenticated are TCB and the reserved word behind it."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    try:
        sticks = AESGCM(wrapping_key(machine)).decrypt(blob.iv, blob.wrapped + blob.tag, blob.to_bytes()[0x190:0x1A0])
    except InvalidTag:
        return None
    return sticks[-STICK_BYTES:]
