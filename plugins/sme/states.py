"""State of SME, and the procedure of encrypting a page in place as a table."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, cast

from sevlab.core.state import StateDict, Stateful, new
from sevlab.core.statemachine import StateMachine

if TYPE_CHECKING:
    from sevlab.core.machine import Machine


class SmeState(Stateful):
    """SYSCFG, and the key slots of the memory controller: key number by ASID, the host's under 0."""

    syscfg: int = 0
    keys: StateDict[int, int] = new(StateDict)


def sme_state(machine: Machine) -> SmeState:
    """The state of the plugin in `machine`."""
    return cast("SmeState", machine.components["sme"])


class PageView(Enum):
    """How far a page is on its way between plaintext and ciphertext."""

    PLAIN = "plaintext, used without the C-bit"
    FLUSHED = "lines of the old view written back"
    COPIED = "bytes copied aside through the old view"
    ENCRYPTED = "ciphertext, used with the C-bit"


class PageAction(Enum):
    """What the driver of the procedure does."""

    FLUSH = "write back and invalidate the page's cache lines"
    COPY_OUT = "copy the page to the intermediate buffer"
    COPY_IN_PRIVATE = "copy the buffer back with the C-bit set"
    COPY_IN_SHARED = "copy the buffer back with the C-bit clear"


class WrongOrder(Enum):
    """What a step out of order does to the page; no status exists for it, the content is simply lost."""

    CONTENT_UNDEFINED = "the page's content is undefined"


PAGE_IN_PLACE = StateMachine(
    name="sme.page-in-place",
    initial=PageView.PLAIN,
    reject=WrongOrder.CONTENT_UNDEFINED,
    table={
        PageView.PLAIN: {PageAction.FLUSH: PageView.FLUSHED},
        PageView.FLUSHED: {PageAction.FLUSH: PageView.FLUSHED, PageAction.COPY_OUT: PageView.COPIED},
        PageView.COPIED: {
            PageAction.COPY_IN_PRIVATE: PageView.ENCRYPTED,
            PageAction.COPY_IN_SHARED: PageView.PLAIN,
        },
        PageView.ENCRYPTED: {PageAction.FLUSH: PageView.FLUSHED},
    },
)
"""Order of the procedure. Source: 24593, 7.10.8; Linux arch/x86/mm/mem_encrypt_boot.S."""
