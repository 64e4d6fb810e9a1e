"""SEV: guests encrypted under keys of their own, and the Secure Processor's commands for them.

Documents: 55766 (SEV API) revision 3.24; 24593 (APM volume 2) revision 3.42, 15.34.
"""

from __future__ import annotations

REQUIRES: tuple[str, ...] = ("sme",)

__all__: list[str] = []
