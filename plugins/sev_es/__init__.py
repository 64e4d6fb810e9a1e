"""SEV-ES: encrypted register state, #VC, VMGEXIT and the GHCB protocol.

Documents: 56421 (GHCB) revision 2.04; 24593 (APM volume 2) revision 3.42, 15.35.
"""

from __future__ import annotations

REQUIRES: tuple[str, ...] = ("sme", "sev")

__all__: list[str] = []
