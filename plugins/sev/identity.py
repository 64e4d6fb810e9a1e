"""The platform's keys: which derive from the chip, which are made, and what signs what."""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

from sevlab.plugins.sev.certificates import SevCertificate, Slot, Usage
from sevlab.plugins.sev.chain import make_certificate, signed_by
from sevlab.plugins.sev.context import Identity, SevState, sev_state
from sevlab.plugins.sev.crypto import KEY_SEED_BYTES, LABEL_CEK, Point, kdf, public_point, scalar_from_seed

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

CHIP_KEY_BYTES = 32
SECP256K1_ORDER = 0xFFFFFFFF_FFFFFFFF_FFFFFFFF_FFFFFFFE_BAAEDCE6_AF48A03B_BFD25E8C_D0364141


@lru_cache(maxsize=16)
def chip_id(chip_key: bytes) -> bytes:
    """What GET_ID tells of a chip: x and y, 32 bytes each, of the generator of secp256k1 scaled by its secret.

    Byte order little-endian as in certificates. UNVERIFIED. Source: AMD-ASPFW sev_uapp/src/sev_plat.c, sev_get_id.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    scalar = int.from_bytes(chip_key, "little") % (SECP256K1_ORDER - 1) + 1
    point = ec.derive_private_key(scalar, ec.SECP256K1()).public_key().public_numbers()
    return point.x.to_bytes(32, "little") + point.y.to_bytes(32, "little")


def chip_endorsement_key(sev: SevState) -> int:
    """The CEK's scalar, from the chip's secret alone. Source: AMD-ASPFW sev_uapp/src/sev_plat.c, sev_cek_derive."""
    return scalar_from_seed(kdf(sha256(sev.chip_key).digest(), LABEL_CEK, b"", KEY_SEED_BYTES))


def new_scalar(machine: Machine, stream: str) -> int:
    """A fresh private key of the platform."""
    return scalar_from_seed(machine.entropy.take(f"sev.{stream}", KEY_SEED_BYTES))


def complete(machine: Machine, identity: Identity) -> bool:
    """Derive the CEK and make what is missing of OCA, PEK and PDH; each new key drops those below it.

    Returns whether anything was made. Source: AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_init_common.
    """
    identity.cek = chip_endorsement_key(sev_state(machine))
    made = False
    if not any(identity.oca_certificate):
        new_oca(machine, identity)
        identity.pek_certificate = b""
        made = True
    if not any(identity.pek_certificate):
        new_pek(machine, identity)
        identity.pdh_certificate = b""
        made = True
    if not any(identity.pdh_certificate):
        new_pdh(machine, identity)
        made = True
    return made


def new_oca(machine: Machine, identity: Identity) -> None:
    """A key of the platform's own as owner, self-signed."""
    identity.oca = new_scalar(machine, "oca")
    certificate = _unsigned(machine, Usage.OCA, identity.oca)
    identity.oca_certificate = signed_by(certificate, Slot.FIRST, Usage.OCA, identity.oca).to_bytes()
    identity.external_owner = False


def new_pek(machine: Machine, identity: Identity) -> None:
    """A platform endorsement key, signed by the OCA and the CEK."""
    identity.pek = new_scalar(machine, "pek")
    certificate = signed_by(_unsigned(machine, Usage.PEK, identity.pek), Slot.FIRST, Usage.OCA, identity.oca)
    identity.pek_certificate = signed_by(certificate, Slot.SECOND, Usage.CEK, identity.cek).to_bytes()


def new_pdh(machine: Machine, identity: Identity) -> None:
    """A Diffie-Hellman key, signed by the PEK."""
    identity.pdh = new_scalar(machine, "pdh")
    certificate = _unsigned(machine, Usage.PDH, identity.pdh)
    identity.pdh_certificate = signed_by(certificate, Slot.FIRST, Usage.PEK, identity.pek).to_bytes()


def csr(identity: Identity) -> bytes:
    """The PEK's certificate without signatures: what an external owner signs."""
    pek = SevCertificate.from_bytes(identity.pek_certificate)
    return without_signatures(pek).to_bytes()


def cek_certificate(machine: Machine, identity: Identity) -> SevCertificate:
    """The CEK's certificate without AMD's signature, which only AMD's key server adds."""
    return _unsigned(machine, Usage.CEK, identity.cek)


def without_signatures(certificate: SevCertificate) -> SevCertificate:
    """The certificate with both slots unused."""
    empty = {"sig_1": bytes(0x200), "sig_2": bytes(0x200)}
    return certificate.replace(
        sig_1_usage=Usage.INVALID, sig_1_algo=0, sig_2_usage=Usage.INVALID, sig_2_algo=0, **empty
    )


def _unsigned(machine: Machine, usage: Usage, scalar: int) -> SevCertificate:
    sev = sev_state(machine)
    return make_certificate(usage, Point(*public_point(scalar)), api=(sev.api_major, sev.api_minor))
