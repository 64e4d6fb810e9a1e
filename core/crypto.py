"""Thin wrappers of `cryptography`: the memory-encryption cipher lives here and nowhere else.

The import is inside the functions: `import sevlab.core` must not pay for it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from sevlab.core.errors import ConfigError
from sevlab.core.units import PAGE_BYTES, PAGE_SHIFT

if TYPE_CHECKING:
    from types import ModuleType

KEY_BITS = (128, 256)
"""AES key sizes of the generations; an XTS key is two of them."""


@cache
def _ciphers() -> tuple[Any, Any, ModuleType]:
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    return Cipher, algorithms.AES, modes


def aes_xts(xts_key: bytes, tweak: bytes, data: bytes | bytearray, *, decrypt: bool = False) -> bytes:
    """AES-XTS of one data unit.

    `xts_key`: 32 or 64 bytes (two AES keys that must differ); `tweak`: 16 bytes; `data`: at least 16 bytes.
    Source: IEEE 1619; NIST SP 800-38E.
    """
    cipher, aes, modes = _ciphers()
    context = cipher(aes(xts_key), modes.XTS(tweak))
    return (context.decryptor() if decrypt else context.encryptor()).update(data)  # type: ignore[no-any-return]


class MemoryKey:
    """One key of the memory controller: encrypts whole pages, with the page's SPA as tweak.

    Two keys are the same only if they are the same object: installing a key again under an ASID makes a new one, and
    what the old one encrypted stays behind as ciphertext.

    The tweak is the page's first SPA as 16 bytes little-endian; 16-byte blocks are then independent of each other, as
    in the parts. The real tweak function differs by generation. UNVERIFIED. Source: spec 55766 names no tweak;
    behaviour as in published attacks (arXiv 1712.05090, 2012.12380).
    """

    __slots__ = ("_aes", "_cipher", "_modes", "key_id", "label", "xts_key")

    def __init__(self, key_id: int, xts_key: bytes, label: str) -> None:
        if len(xts_key) * 4 not in KEY_BITS:
            raise ConfigError(f"memory key {label!r}: {len(xts_key)} bytes, expected 32 or 64 (two AES keys)")
        self.key_id = key_id
        self.xts_key = xts_key
        self.label = label
        self._cipher, aes, self._modes = _ciphers()
        self._aes = aes(xts_key)

    def __repr__(self) -> str:
        return f"MemoryKey({self.key_id}, {self.label!r}, AES-{len(self.xts_key) * 4})"

    def encrypt_page(self, pfn: int, plaintext: bytes | bytearray | memoryview) -> bytes:
        """Ciphertext of the 4096 bytes `plaintext` at page frame `pfn`."""
        tweak = (pfn << PAGE_SHIFT).to_bytes(16, "little")
        return self._cipher(self._aes, self._modes.XTS(tweak)).encryptor().update(plaintext)  # type: ignore[no-any-return]

    def decrypt_page(self, pfn: int, ciphertext: bytes | bytearray) -> bytes:
        """What this key makes of the 4096 bytes `ciphertext` at page frame `pfn`: garbage if it is not its own."""
        tweak = (pfn << PAGE_SHIFT).to_bytes(16, "little")
        return self._cipher(self._aes, self._modes.XTS(tweak)).decryptor().update(ciphertext)  # type: ignore[no-any-return]


ZERO_PAGE = bytes(PAGE_BYTES)
