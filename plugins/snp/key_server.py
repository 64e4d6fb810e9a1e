"""What AMD's key server answers for a simulated chip: the certificates behind its reports.

Nothing of the machine changes; a real platform asks the server over the network with chip id and TCB.
Source: 57230 (KDS interface); Linux Documentation/virt/coco/sev-guest.rst (extended report).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.plugins.sev import public_point
from sevlab.plugins.snp.attestation import chip_id_of
from sevlab.plugins.snp.cert_table import GUIDS, build_cert_table
from sevlab.plugins.snp.chain import ca_certificate, vcek_certificate, vlek_certificate
from sevlab.plugins.snp.keys import STICK_BYTES, signing_scalar, vcek_stick, vlek_sticks
from sevlab.plugins.snp.states import snp_state
from sevlab.plugins.snp.tcb import Tcb

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


def vcek_certificates(machine: Machine, tcb: int | None = None) -> dict[str, bytes]:
    """DER of "vcek", "ask" and "ark" for the machine's chip at `tcb` (64 bits; None: the reported TCB)."""
    generation = machine.config.part.name
    raw = snp_state(machine).platform.reported_tcb if tcb is None else tcb
    public = public_point(signing_scalar(vcek_stick(machine, raw)))
    vcek = vcek_certificate(generation, public, tcb=Tcb.of(raw, generation), chip_id=chip_id_of(machine))
    return {"vcek": vcek, "ask": ca_certificate(generation, "ask"), "ark": ca_certificate(generation, "ark")}


def vlek_certificates(generation: str, provider_secret: bytes, tcb: int, csp_id: str) -> dict[str, bytes]:
    """DER of "vlek", "ask" (the ASVK, as tables name it) and "ark" for a provider at `tcb`."""
    public = public_point(signing_scalar(vlek_sticks(provider_secret, tcb)[-STICK_BYTES:]))
    vlek = vlek_certificate(generation, public, tcb=Tcb.of(tcb, generation), csp_id=csp_id)
    return {"vlek": vlek, "ask": ca_certificate(generation, "asvk"), "ark": ca_certificate(generation, "ark")}


def certificate_table(certificates: dict[str, bytes]) -> bytes:
    """The table with which a host answers an extended guest request."""
    return build_cert_table((GUIDS[kind], der) for kind, der in certificates.items())
