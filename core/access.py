"""Who reaches memory how: one explicit path for each actor.

- the guest: its own page tables, then the nested ones, C-bit and key, then the check of the slot `access_check`;
  instruction fetches and page-table walks are always private in an encrypted guest;
- the hypervisor: system physical, C-bit of its choice (the SME key);
- the ASP: system physical with the C-bit in the address, or with a guest's key;
- DMA: system physical, never encrypted, whatever the page holds.

Source: spec 24593, 15.34 (key selection) and 15.36 (checks).
"""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sevlab.core.buffers import SharedBuffer
from sevlab.core.cpu import CONTROL_NESTED_PAGING, FaultUnwind, Vcpu
from sevlab.core.crypto import MemoryKey
from sevlab.core.events import Fault, Party
from sevlab.core.memory import TAG_ASP, TAG_DEVICE, TAG_HYPERVISOR, TAG_PUBLIC, split_pages
from sevlab.core.svm import NpfError, Vector
from sevlab.core.units import HOST_ASID, PAGE_MASK

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


class Actor(Protocol):
    """Who accesses memory: the vCPU, or one of the constants below. `tag` is whose data its writes are."""

    @property
    def asid(self) -> int: ...
    @property
    def vmpl(self) -> int: ...
    @property
    def tag(self) -> int: ...


class HostActor(NamedTuple):
    """An actor outside the guests."""

    party: Party
    tag: int
    asid: int = HOST_ASID
    vmpl: int = 0


HYPERVISOR = HostActor(Party.HYPERVISOR, TAG_HYPERVISOR)
ASP = HostActor(Party.ASP, TAG_ASP)
DMA = HostActor(Party.DMA, TAG_DEVICE)


class AccessKind(IntFlag):
    """What an access is; the argument `kind` of the slot `access_check`."""

    READ = 0
    WRITE = 1 << 0
    FETCH = 1 << 1
    TABLE = 1 << 2
    """A page-table access by the walker."""
    PRIVATE = 1 << 3
    """The effective C-bit is 1."""
    LARGE = 1 << 4
    """The nested mapping is 2 MiB or larger."""
    USER = 1 << 5


GPA_NONE = -1
"""The `gpa` of a host access."""
