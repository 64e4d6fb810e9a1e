"""A real kernel as HVM guest of Xen under a CPU engine: what it asks of Xen, from where, and what of it breaks under
encryption. `sevlab run --xen`.

Documents: those of `xen` and `engines`; Linux arch/x86/xen, arch/x86/coco/sev/core.c (vc_handle_vmmcall).

What you may touch: `XenGuestWatch` (around a guest that `engines.boot` made).
"""

from __future__ import annotations

from sevlab.plugins.xen_guest.watch import XenGuestWatch

REQUIRES: tuple[str, ...] = ("sev_es", "io", "xen", "engines")

__all__ = ["XenGuestWatch"]
