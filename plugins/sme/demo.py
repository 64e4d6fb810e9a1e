"""The demo chapter of SME."""

from __future__ import annotations

from collections.abc import Callable

from sevlab.core.config import MachineConfig
from sevlab.core.events import Data, HostMsr, MemoryRead, MemoryWrite, Party, Space
from sevlab.core.machine import Machine
from sevlab.plugins.sme.inplace import decrypt_in_place, encrypt_in_place
from sevlab.plugins.sme.layout import MEM_ENCRYPTION_MOD_EN, SYSCFG

SECRET = b"root:$6$salt$hash of the administrator's password"
PAGE_SPA = 0x20_0000


def chapter(say: Callable[[str], object]) -> None:
    """Boot with SME, encrypt a page in place, and look at it as the host, a device and a cold-boot reader do."""
    machine = Machine(MachineConfig(plugins=("sme",), memory_bytes=1 << 40))
    part = machine.config.part
    say(f"   A {part.name} with 1 TiB of memory, C-bit {part.c_bit}, AES-{part.key_bits}: nothing is stored yet")
    machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, PAGE_SPA, False, SECRET.ljust(4096, b".")))
    _show(machine, say, "before")
    machine.apply(HostMsr(SYSCFG, True, MEM_ENCRYPTION_MOD_EN))
    say("\n   WRMSR SYSCFG.MemEncryptionModEn = 1, then for the page: flush, copy out with C=0, copy in with C=1\n")
    encrypt_in_place(machine, PAGE_SPA)
    _show(machine, say, "after ")
    pages = len(machine.memory.pages)
    decrypt_in_place(machine, PAGE_SPA)
    back = machine.memory.dram(PAGE_SPA, len(SECRET)) == SECRET
    say(f"\n   Decrypted in place again: {'the same bytes' if back else 'NOT the same bytes'}; {pages} page in use")


def _show(machine: Machine, say: Callable[[str], object], when: str) -> None:
    views = (
        ("host, C=1", machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, PAGE_SPA, True, 32))),
        ("host, C=0", machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, PAGE_SPA, False, 32))),
        ("device DMA", machine.apply(MemoryRead(Party.DMA, 0, Space.SPA, PAGE_SPA, False, 32))),
    )
    for who, outcome in views:
        data = outcome.first(Data)
        if data is not None:
            say(f"   {when}  {who:<10}  {data.data.hex(' ', 4)}  {_text(data.data)}")
    cells = machine.memory.dram(PAGE_SPA, 32)
    say(f"   {when}  DRAM cells  {cells.hex(' ', 4)}  {_text(cells)}")


def _text(data: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in data)  # printable ASCII
