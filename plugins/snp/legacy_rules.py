"""Legacy commands while SNP is initialised: a buffer that the firmware answers in must be a Firmware page.

The command buffer of such a command is looked at before anything else, and its error is 5Ah, 40h above
INVALID_PAGE_STATE, so that a driver can tell it from a data page's; afterwards the page is Reclaim. Data pages are
asked about by the commands themselves, through the slot `access_check`.

Source: 55766 and 56860, legacy commands; AMD-ASPFW sev_uapp/src/sev_mcmd.c and main.c; Linux ccp/sev-dev.c.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.memory import split_pages
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins.sev import LEGACY, LEGACY_COMMANDS, Status, sev_state
from sevlab.plugins.snp.handlers.common import FIRMWARE_WRITES, plain
from sevlab.plugins.snp.rmp import change_state, state_of
from sevlab.plugins.snp.states import PageEvent

if TYPE_CHECKING:
    from sevlab.core.asp import AspCommandEntry, Command
    from sevlab.core.builder import PluginBuilder
    from sevlab.core.machine import Machine

COMMAND_BUFFER_STATE = Status.INVALID_PAGE_STATE + 0x40
"""Status of a command buffer in the wrong page state."""


def register(builder: PluginBuilder) -> None:
    """Put the rule before each legacy command of which the firmware demands it."""
    for declared in LEGACY_COMMANDS:
        if declared.firmware_page:
            builder.asp_commands.replace((LEGACY.interface, int(declared.command)), guarded)


def guarded(original: AspCommandEntry) -> AspCommandEntry:
    """The command with the rule around it."""

    def run(machine: Machine, command: Command) -> int:
        if not sev_state(machine).snp_initialised:
            return original.handler(machine, command)
        pages = pages_of(machine, command.spa, original.buffer_bytes)
        if any(state_of(machine, spa) not in FIRMWARE_WRITES for spa in pages):
            return COMMAND_BUFFER_STATE
        status = original.handler(machine, command)
        for spa in pages:
            change_state(machine, spa, PageEvent.COMMAND_DONE)
        return status

    return original._replace(handler=run)


def pages_of(machine: Machine, address: int, length_bytes: int) -> tuple[int, ...]:
    """SPAs of the pages that a buffer lies in; it may have any alignment."""
    return tuple(spa & -PAGE_BYTES for spa, _ in split_pages(plain(machine, address), length_bytes))
