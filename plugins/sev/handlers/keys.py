"""The platform's keys: PEK_GEN, PEK_CSR, PEK_CERT_IMPORT, PDH_CERT_EXPORT, PDH_GEN."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.plugins.sev import identity as keys
from sevlab.plugins.sev import nvram, transfers
from sevlab.plugins.sev.buffers import OneBlob, PdhCertExport, PekCertImport
from sevlab.plugins.sev.certificates import SIGNED_BYTES, SevCertificate, Slot, Usage, slot_of
from sevlab.plugins.sev.chain import with_signature
from sevlab.plugins.sev.command import NoBuffer, Request
from sevlab.plugins.sev.context import sev_state
from sevlab.plugins.sev.layout import CERTIFICATE_BYTES, CHAIN_BYTES
from sevlab.plugins.sev.numbers import Status
from sevlab.plugins.sev.validation import validate

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


def pek_gen(machine: Machine, _request: Request[NoBuffer]) -> Status:
    """New OCA, PEK and PDH; the platform owns itself again. Source: 55766, PEK_GEN; AMD-ASPFW sev_mcmd.c."""
    identity = sev_state(machine).identity
    keys.new_oca(machine, identity)
    keys.new_pek(machine, identity)
    keys.new_pdh(machine, identity)
    nvram.store(machine, identity)
    return Status.SUCCESS


def pdh_gen(machine: Machine, _request: Request[NoBuffer]) -> Status:
    """A new PDH, signed by the PEK. Source: 55766, PDH_GEN; AMD-ASPFW sev_mcmd.c."""
    identity = sev_state(machine).identity
    keys.new_pdh(machine, identity)
    nvram.store(machine, identity)
    return Status.SUCCESS


def pek_csr(machine: Machine, request: Request[OneBlob]) -> Status:
    """The PEK's certificate without signatures, for an external owner to sign. Source: 55766, PEK_CSR."""
    buffer = request.buffer
    request.answer(length=CERTIFICATE_BYTES)
    if buffer.length < CERTIFICATE_BYTES:
        return Status.INVALID_LENGTH
    status = transfers.output_status(machine, buffer.spa, buffer.length)
    if status:
        return status
    if not transfers.valid_range(machine, buffer.spa, CERTIFICATE_BYTES):
        return Status.INVALID_ADDRESS
    transfers.write(machine, buffer.spa, keys.csr(sev_state(machine).identity))
    return Status.SUCCESS


def pek_cert_import(machine: Machine, request: Request[PekCertImport]) -> Status:
    """Take an external owner: his OCA, and the PEK as he signed it; the PDH is made anew.

    Source: 55766, PEK_CERT_IMPORT; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_pek_cert_import (order of checks).
    """
    identity = sev_state(machine).identity
    buffer = request.buffer
    if identity.external_owner:
        return Status.ALREADY_OWNED
    if buffer.pek_bytes != CERTIFICATE_BYTES or buffer.oca_bytes != CERTIFICATE_BYTES:
        return Status.INVALID_LENGTH
    pek_bytes = transfers.read(machine, buffer.pek_spa, CERTIFICATE_BYTES)
    oca_bytes = transfers.read(machine, buffer.oca_spa, CERTIFICATE_BYTES)
    if pek_bytes is None or oca_bytes is None:
        return Status.INVALID_ADDRESS
    pek, oca = SevCertificate.from_bytes(pek_bytes), SevCertificate.from_bytes(oca_bytes)
    status = validate(oca, oca) or validate(pek, oca)
    if status:
        return status
    if pek_bytes[:SIGNED_BYTES] != identity.pek_certificate[:SIGNED_BYTES]:
        return Status.INVALID_CERTIFICATE
    endorsed = _with_cek_signature(pek, SevCertificate.from_bytes(identity.pek_certificate))
    if endorsed is None:
        return Status.INVALID_CERTIFICATE
    identity.oca, identity.oca_certificate = 0, oca_bytes
    identity.pek_certificate = endorsed.to_bytes()
    identity.external_owner = True
    keys.new_pdh(machine, identity)
    nvram.store(machine, identity)
    return Status.SUCCESS


def _with_cek_signature(imported: SevCertificate, own: SevCertificate) -> SevCertificate | None:
    """The imported PEK with the CEK's signature of the present one in its unused slot; None when it has none."""
    ours = next((slot_of(own, slot) for slot in Slot if slot_of(own, slot)[0] == Usage.CEK), None)
    free = next((slot for slot in Slot if slot_of(imported, slot)[0] == Usage.INVALID), None)
    if ours is None or free is None:
        return None
    _, algorithm, signature = ours
    return with_signature(imported, free, Usage.CEK, algorithm, signature)


def pdh_cert_export(machine: Machine, request: Request[PdhCertExport]) -> Status:
    """The PDH's certificate, and the chain PEK, OCA, CEK; AMD's signature of the CEK is not on the chip.

    Source: 55766, PDH_CERT_EXPORT; AMD-ASPFW sev_uapp/src/sev_mcmd.c, sev_mcmd_pdh_cert_export.
    """
    buffer = request.buffer
    request.answer(pdh_bytes=CERTIFICATE_BYTES, chain_bytes=CHAIN_BYTES)
    if buffer.pdh_bytes < CERTIFICATE_BYTES or buffer.chain_bytes < CHAIN_BYTES:
        return Status.INVALID_LENGTH
    status = transfers.output_status(machine, buffer.pdh_spa, buffer.pdh_bytes) or transfers.output_status(
        machine, buffer.chain_spa, buffer.chain_bytes
    )
    if status:
        return status
    places = ((buffer.pdh_spa, CERTIFICATE_BYTES), (buffer.chain_spa, CHAIN_BYTES))
    if not all(transfers.valid_range(machine, spa, length) for spa, length in places):
        return Status.INVALID_ADDRESS
    identity = sev_state(machine).identity
    cek = keys.cek_certificate(machine, identity).to_bytes()
    transfers.write(machine, buffer.pdh_spa, identity.pdh_certificate)
    transfers.write(machine, buffer.chain_spa, identity.pek_certificate + identity.oca_certificate + cek)
    return Status.SUCCESS
