"""Words of the I/O exits: they are the architecture's and live in the kernel."""

from __future__ import annotations

from sevlab.core.exitinfo import ADDRESS_BITS, SEGMENT_NUMBERS, EventWord, IoioInfo, ioio_word

__all__ = ["ADDRESS_BITS", "SEGMENT_NUMBERS", "EventWord", "IoioInfo", "ioio_word"]
