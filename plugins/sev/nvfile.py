"""The keys of a platform in a file, as Linux keeps them with the module parameter `init_ex_path`.

The driver reads the file into the area of INIT_EX, and writes the area back after each command that changes keys.
Source: Linux drivers/crypto/ccp/sev-dev.c, sev_read_init_ex_file and sev_write_init_ex_file_if_required.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sevlab.core.errors import FormatError
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins.sev import driver
from sevlab.plugins.sev.numbers import Command
from sevlab.plugins.sev.nvram import NV_AREA_BYTES

if TYPE_CHECKING:
    from sevlab.core.layout import FieldValue
    from sevlab.core.machine import Machine

WRITERS = (Command.INIT_EX, Command.PEK_GEN, Command.PEK_CERT_IMPORT, Command.PDH_GEN, Command.PLATFORM_RESET)
"""Commands after which the file is written. Source: Linux sev-dev.c."""


class NvFile:
    """A file of 32 KiB at `path`; one that does not exist is made, empty as erased flash."""

    def __init__(self, machine: Machine, path: Path) -> None:
        self.machine = machine
        self.path = path
        self.area_spa = machine.hypervisor.allocate_pages(NV_AREA_BYTES // PAGE_BYTES)

    def initialise(self, *, es: bool = False) -> int:
        """Run INIT_EX with the keys of the file; returns the status. Raises `FormatError` for a file of another length.

        The firmware erases an area that it cannot authenticate; then the file is erased too.
        """
        data = self.path.read_bytes() if self.path.exists() else b"\xff" * NV_AREA_BYTES
        if len(data) != NV_AREA_BYTES:
            raise FormatError(
                str(self.path),
                min(len(data), NV_AREA_BYTES),
                "non-volatile area",
                expected=f"{NV_AREA_BYTES:#x} bytes",
                found=f"{len(data):#x}",
            )
        driver.put(self.machine, self.area_spa, data)
        driver.enable_encryption(self.machine)
        fields = driver.tmr_fields(self.machine) if es else {}
        return self.run(Command.INIT_EX, length=0x24, nv_spa=self.area_spa, nv_bytes=NV_AREA_BYTES, **fields).status

    def run(self, command: Command, **fields: FieldValue) -> driver.Reply:
        """Run a command, and write the file back where the command changes keys."""
        reply = driver.run(self.machine, command, buffer_spa=0, **fields)
        if command in WRITERS:
            self.path.write_bytes(driver.get(self.machine, self.area_spa, NV_AREA_BYTES))
        return reply
