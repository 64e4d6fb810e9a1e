"""SEV-ES: encrypted register state, #VC, VMGEXIT and the GHCB protocol.

Documents: 56421 (GHCB) revision 2.04; 24593 (APM volume 2) revision 3.42, 15.35.

What you may touch: `Vmsa` and `initial_vmsa` (the encrypted save area and what it holds at launch, by `PROFILES`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.hookspecs import hookimpl
from sevlab.plugins.sev_es.profiles import PROFILES, RESET_EIP, VmsaProfile, initial_vmsa
from sevlab.plugins.sev_es.vmsa import SevFeatures, Vmsa, segment_bytes, segment_of

if TYPE_CHECKING:
    from sevlab.core.layout import Layout

REQUIRES: tuple[str, ...] = ("sme", "sev")

__all__ = [
    "PROFILES",
    "RESET_EIP",
    "SevFeatures",
    "Vmsa",
    "VmsaProfile",
    "initial_vmsa",
    "segment_bytes",
    "segment_of",
]


@hookimpl
def sevlab_layouts() -> tuple[type[Layout], ...]:
    return (Vmsa, SevFeatures)
