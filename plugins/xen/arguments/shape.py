"""A structure in its two widths."""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.layout import Layout


class Shape(NamedTuple):
    """A structure in its 64-bit and its 32-bit form."""

    wide: type[Layout]
    narrow: type[Layout]
