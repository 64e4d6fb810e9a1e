"""SEV: guests encrypted under keys of their own, and the Secure Processor's commands for them.

Documents: 55766 (SEV API) revision 3.24; 24593 (APM volume 2) revision 3.42, 15.34.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.hookspecs import hookimpl
from sevlab.plugins.sev.certificates import AmdCertificateHeader, EcdsaSignature, EcPublicKey, SevCertificate
from sevlab.plugins.sev.chain import Check
from sevlab.plugins.sev.signatures import Point, RsaKey, ec_public_point, ec_scalar, ecdsa_sign, rsa_pss_sign
from sevlab.plugins.sev.vendor import vendor_key

if TYPE_CHECKING:
    from sevlab.core.layout import Layout

REQUIRES: tuple[str, ...] = ("sme",)

__all__ = [
    "Check",
    "Point",
    "RsaKey",
    "ec_public_point",
    "ec_scalar",
    "ecdsa_sign",
    "rsa_pss_sign",
    "vendor_key",
]


@hookimpl
def sevlab_layouts() -> tuple[type[Layout], ...]:
    return (SevCertificate, EcPublicKey, EcdsaSignature, AmdCertificateHeader)
