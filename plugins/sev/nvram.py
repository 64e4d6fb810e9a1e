"""Where the platform keeps its keys: encrypted and authenticated, in the SPI flash or in memory for INIT_EX.

The stored form is AES-128-CTR ciphertext, HMAC-SHA256 over it, IV; an area that starts with FFFFFFFFh is empty.
Source: AMD-ASPFW sev_uapp/src/{sev_persistent,sev_wrap}.c. The plaintext's layout is the firmware's own affair; the
one here is ours. UNVERIFIED.
"""

from __future__ import annotations

from hmac import compare_digest, digest
from typing import TYPE_CHECKING

from sevlab.core.layout import Layout, flag, raw_bytes, u32
from sevlab.plugins.sev import transfers
from sevlab.plugins.sev.context import Identity, sev_state
from sevlab.plugins.sev.crypto import aes_ctr, kdf
from sevlab.plugins.sev.layout import CERTIFICATE_BYTES, FIELD_BYTES, KEY_BYTES, MAC_BYTES

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

NV_AREA_BYTES = 0x8000
"""Length of the area of INIT_EX. Source: Linux drivers/crypto/ccp/sev-dev.c, NV_LENGTH."""

LABEL_ENCRYPTION = b"sev-persistent-encryption"
LABEL_INTEGRITY = b"sev-persistent-integrity"
EMPTY = b"\xff" * 4


class Persistent(Layout, size=4 + 3 * (FIELD_BYTES + CERTIFICATE_BYTES)):
    """The keys that outlive a power cycle: OCA (its private part only while the platform owns itself), PEK, PDH."""

    external_owner = flag(0x0000, u32, 0)
    oca = raw_bytes(0x0004, FIELD_BYTES)
    oca_certificate = raw_bytes(0x0034, CERTIFICATE_BYTES)
    pek = raw_bytes(0x0858, FIELD_BYTES)
    pek_certificate = raw_bytes(0x0888, CERTIFICATE_BYTES)
    pdh = raw_bytes(0x10AC, FIELD_BYTES)
    pdh_certificate = raw_bytes(0x10DC, CERTIFICATE_BYTES)


STORED_BYTES = Persistent.SIZE + MAC_BYTES + KEY_BYTES


class Corrupt:
    """The stored form does not authenticate."""


def wrap(chip_key: bytes, iv: bytes, plaintext: bytes) -> bytes:
    """The stored form of `plaintext`."""
    ciphertext = aes_ctr(kdf(chip_key, LABEL_ENCRYPTION, bytes(4), KEY_BYTES), iv, plaintext)
    return ciphertext + digest(kdf(chip_key, LABEL_INTEGRITY, bytes(4), KEY_BYTES), ciphertext, "sha256") + iv


def unwrap(chip_key: bytes, stored: bytes) -> bytes | Corrupt:
    """The plaintext of the stored form."""
    ciphertext, mac, iv = stored[: -MAC_BYTES - KEY_BYTES], stored[-MAC_BYTES - KEY_BYTES : -KEY_BYTES], stored[-16:]
    if not compare_digest(mac, digest(kdf(chip_key, LABEL_INTEGRITY, bytes(4), KEY_BYTES), ciphertext, "sha256")):
        return Corrupt()
    return aes_ctr(kdf(chip_key, LABEL_ENCRYPTION, bytes(4), KEY_BYTES), iv, ciphertext)


def load(machine: Machine, nv_spa: int) -> Identity | Corrupt:
    """The stored keys as a fresh identity, empty when nothing is stored; `nv_spa` 0: the SPI flash."""
    sev = sev_state(machine)
    stored = sev.spi if not nv_spa else transfers.read(machine, nv_spa, STORED_BYTES) or b""
    if not stored or stored[:4] == EMPTY:
        return Identity()
    plain = unwrap(sev.chip_key, stored)
    if isinstance(plain, Corrupt):
        return plain
    kept = Persistent.from_bytes(plain)
    return Identity(
        oca=int.from_bytes(kept.oca, "little"),
        oca_certificate=kept.oca_certificate,
        pek=int.from_bytes(kept.pek, "little"),
        pek_certificate=kept.pek_certificate,
        pdh=int.from_bytes(kept.pdh, "little"),
        pdh_certificate=kept.pdh_certificate,
        external_owner=bool(kept.external_owner),
    )


def store(machine: Machine, identity: Identity) -> None:
    """Keep the keys where INIT or INIT_EX said."""
    sev = sev_state(machine)
    plain = Persistent.build(
        external_owner=int(identity.external_owner),
        oca=identity.oca.to_bytes(FIELD_BYTES, "little"),
        oca_certificate=identity.oca_certificate,
        pek=identity.pek.to_bytes(FIELD_BYTES, "little"),
        pek_certificate=identity.pek_certificate,
        pdh=identity.pdh.to_bytes(FIELD_BYTES, "little"),
        pdh_certificate=identity.pdh_certificate,
    )
    stored = wrap(sev.chip_key, machine.entropy.take("sev.nvram", KEY_BYTES), plain)
    if sev.nv_spa:
        transfers.write(machine, sev.nv_spa, stored.ljust(NV_AREA_BYTES, b"\xff"))
    else:
        sev.spi = stored


def erase(machine: Machine, nv_spa: int) -> None:
    """Make the store empty: all ones in memory."""
    if nv_spa:
        transfers.write(machine, nv_spa, b"\xff" * NV_AREA_BYTES)
    else:
        sev_state(machine).spi = b""
