"""Ports that tell the outside something: POST code, debug console, exit.

Source: QEMU hw/char/debugcon.c, hw/misc/debugexit.c; kvm-unit-tests lib/x86/io.c.
"""

from __future__ import annotations

from sevlab.core.state import Stateful, new
from sevlab.plugins.io.devices.registers import Register, Text

POST_PORT, CONSOLE_PORT, EXIT_PORT, EXIT_BYTES = 0x80, 0xE9, 0xF4, 4

REGISTERS = (
    Register(0x80, "POST", 1, "rw", "last code; used as a delay"),
    Register(0xE9, "console", 1, "rw", "a byte of text; reads E9h"),
    Register(0xF4, "exit", 4, "w", "ends the guest with status (value << 1) | 1; bytes of it too"),
)


class DebugPorts(Stateful):
    """What was written; `exit_status` is -1 until the guest asked to end."""

    post_code: int = 0
    text: Text = new(Text)
    exit_status: int = -1

    @property
    def console(self) -> bytes:
        """Everything written to the console."""
        return bytes(self.text)

    def read(self, port: int) -> int:
        """Read a byte from one of the ports; the exit port reads zero."""
        return {POST_PORT: self.post_code, CONSOLE_PORT: CONSOLE_PORT}.get(port, 0)

    def write(self, port: int, value: int) -> None:
        """Write to one of the ports."""
        if port == POST_PORT:
            self.post_code = value & 0xFF
        elif port == CONSOLE_PORT:
            self.text.append(bytes([value & 0xFF]))
        else:
            self.exit_status = value << 1 & 0xFFFF_FFFF | 1
