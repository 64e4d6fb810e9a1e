"""SEV-SNP: RMP, launch, guest messages, attestation, VMPLs and page states.

Documents: 56860 (SNP firmware ABI) revision 1.58; 56421 (GHCB) revision 2.04; 24593 (APM volume 2) revision 3.42,
15.36.
"""

from __future__ import annotations

REQUIRES: tuple[str, ...] = ("sme", "sev", "sev_es")

__all__: list[str] = []
