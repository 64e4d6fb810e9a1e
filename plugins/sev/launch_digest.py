"""The launch digest of SEV and SEV-ES: SHA-256 of everything that was loaded, in order.

Source: 55766, LAUNCH_UPDATE_DATA, LAUNCH_UPDATE_VMSA, LAUNCH_MEASURE.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from sevlab.core.units import PAGE_BYTES


class LoadedPart(NamedTuple):
    """One line of the log: up to a page of what was loaded, and the launch digest after it.

    `gpa` is None for a VMSA, which SEV-ES does not bind to an address; `contents` is SHA-256 of the part.
    """

    part: str
    gpa: int | None
    length_bytes: int
    contents: bytes
    launch_digest: bytes


class SevLaunchDigest:
    """A launch digest as it grows. With `log`, every page is hashed on its own too, which takes twice the time."""

    def __init__(self, *, log: bool = False) -> None:
        self._hash = hashlib.sha256()
        self._log = log
        self.parts: list[LoadedPart] = []

    @property
    def value(self) -> bytes:
        """The 32 bytes so far."""
        return self._hash.digest()

    def add(self, part: str, gpa: int | None, data: bytes) -> None:
        """Load `data`, named `part`, at `gpa`."""
        if not self._log:
            self._hash.update(data)
            return
        view = memoryview(data)
        for offset in range(0, len(data), PAGE_BYTES):
            piece = view[offset : offset + PAGE_BYTES]
            self._hash.update(piece)
            place = None if gpa is None else gpa + offset
            self.parts.append(LoadedPart(part, place, len(piece), hashlib.sha256(piece).digest(), self.value))
