"""Encrypt and decrypt memory in place, as an operating system does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.errors import ConfigError
from sevlab.core.events import CacheOp, Data, MemoryRead, MemoryWrite, Party, Space
from sevlab.core.units import PAGE_BYTES, is_aligned
from sevlab.plugins.sme.states import PAGE_IN_PLACE, PageAction, PageView

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sevlab.core.machine import Machine
    from sevlab.core.vocabulary import Record


def encrypt_in_place(machine: Machine, spa: int, length_bytes: int = PAGE_BYTES) -> None:
    """Turn plaintext at `spa` into ciphertext of the same bytes; `spa` and length multiples of 4096.

    For each page: write back its lines, copy it out without the C-bit, copy it in with the C-bit. The real procedure
    maps the source write-protected so that no line of the old view is dirty. Source: 24593, 7.10.8.
    """
    _convert(machine, spa, length_bytes, PageView.PLAIN, to_private=True)


def decrypt_in_place(machine: Machine, spa: int, length_bytes: int = PAGE_BYTES) -> None:
    """Turn ciphertext at `spa` into plaintext of the same bytes; `spa` and length multiples of 4096."""
    _convert(machine, spa, length_bytes, PageView.ENCRYPTED, to_private=False)


def _convert(machine: Machine, spa: int, length_bytes: int, view: PageView, *, to_private: bool) -> None:
    if not is_aligned(spa, PAGE_BYTES) or not is_aligned(length_bytes, PAGE_BYTES):
        raise ConfigError(f"spa {spa:#x}, {length_bytes:#x} bytes: expected multiples of {PAGE_BYTES:#x}")
    for page_spa in range(spa, spa + length_bytes, PAGE_BYTES):
        state = view
        content = b""
        for action in _actions(to_private=to_private):
            following = PAGE_IN_PLACE.next(state, action)
            if following is None:
                raise ConfigError(f"page {page_spa:#x}: {action.value} while the page is {state.value}")
            outcome = machine.apply(_step(action, page_spa, content, private=to_private))
            data = outcome.first(Data)
            content = data.data if data is not None else content
            state = following


def _actions(*, to_private: bool) -> Iterator[PageAction]:
    yield PageAction.FLUSH
    yield PageAction.COPY_OUT
    yield PageAction.COPY_IN_PRIVATE if to_private else PageAction.COPY_IN_SHARED


def _step(action: PageAction, spa: int, content: bytes, *, private: bool) -> Record:
    if action is PageAction.FLUSH:
        return CacheOp("clflush", spa)
    if action is PageAction.COPY_OUT:
        return MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, not private, PAGE_BYTES)
    return MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, spa, private, content)
