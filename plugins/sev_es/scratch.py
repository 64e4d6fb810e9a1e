"""The scratch area of a request: where it may lie, and one copy of it.

Version 1: in the page's shared buffer, or in shared guest memory up to 64 KiB. Version 2: only in the shared buffer;
KVM before 2026 took the other place all the same. Source: 56421, 2.4 and 4.1; Linux arch/x86/kvm/svm/sev.c
(setup_vmgexit_scratch).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.units import MASK64
from sevlab.plugins.sev_es.ghcb import SHARED_BUFFER_BYTES, SHARED_BUFFER_OFFSET

if TYPE_CHECKING:
    from sevlab.core.buffers import SharedBuffer
    from sevlab.core.cpu import Vcpu
    from sevlab.core.machine import Machine

SCRATCH_LIMIT_BYTES = 16 << 12
"""Longest scratch area outside the page that KVM takes."""


class Scratch:
    """A scratch area: `data` as it was when the request was read, and `write` for the answer."""

    __slots__ = ("_offset", "_window", "data", "rest", "written")

    def __init__(self, window: SharedBuffer, offset: int, rest: bytes, length_bytes: int) -> None:
        self._window = window
        self._offset = offset
        self.data = rest[:length_bytes]
        self.rest = rest
        """From the start to the end of the buffer that the area lies in: what a page state change may use."""
        self.written = b""

    def write(self, data: bytes) -> None:
        """Store the answer from the start; not more than was asked for."""
        self._window.write(self._offset, data)
        self.written = data


def find_scratch(
    machine: Machine,
    vcpu: Vcpu,
    window: SharedBuffer,
    page: bytes,
    ghcb_gpa: int,
    gpa: int,
    length: int,
    *,
    inside: bool,
) -> Scratch | None:
    """The scratch area of `length` bytes at `gpa`, or None when it breaks a rule.

    `page` is the snapshot of the GHCB, from which an area inside is taken; `inside` refuses any other place.
    """
    if not gpa or not length or gpa + length > MASK64:
        return None
    offset = gpa - ghcb_gpa
    if 0 <= offset < len(page):
        end = SHARED_BUFFER_OFFSET + SHARED_BUFFER_BYTES
        if offset < SHARED_BUFFER_OFFSET or offset + length > end:
            return None
        return Scratch(window, offset, page[offset:end], length)
    if inside or length > SCRATCH_LIMIT_BYTES:
        return None
    outside = machine.access.shared_window(vcpu, gpa, length)
    if outside is None:
        return None
    return Scratch(outside, 0, outside.read(0, length), length)
