"""Xen: the hypercall ABIs of a guest, with real state behind them.

Documents: Xen public headers xen/include/public of 4.17 and later.
"""

from __future__ import annotations

REQUIRES: tuple[str, ...] = ("io",)

__all__: list[str] = []
