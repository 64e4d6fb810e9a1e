"""The capture of a real SEV-ES Linux, as #VCs with the requests that belong to each."""

from __future__ import annotations

import json
import lzma
from typing import NamedTuple

from sevlab.core.cpu import GPR_NAMES, Registers, SystemRegisters
from sevlab.plugins.sev_es import VALID_BITS, Ghcb, VcContext

from tests.vectors import capture_set

NAME = "guest-sev-es/linux-6.1-boot.ghcb.jsonl.xz"
LONG_MODE = {"cs": (0x10, 0x29B | 1 << 9, 0xFFFF_FFFF, 0), "efer": 0xD01}


class Page(NamedTuple):
    """One recorded request by the page, and its reply."""

    number: int
    gpa: int
    qwords: dict[int, int]
    version: int
    usage: int
    data: bytes
    reply: dict[int, int]
    reply_data: bytes

    @property
    def valid(self):
        return self.qwords.get(0x3F0, 0) | self.qwords.get(0x3F8, 0) << 64

    def fields(self):
        """The fields that are marked valid."""
        return {
            name: self.qwords.get(Ghcb.FIELDS[name].offset, 0) for name, bit in VALID_BITS.items() if self.valid & bit
        }

    def image(self):
        """The 4096 bytes that the guest left."""
        out = bytearray(4096)
        for offset, value in self.qwords.items():
            out[offset : offset + 8] = value.to_bytes(8, "little")
        out[0x800 : 0x800 + len(self.data)] = self.data
        out[0xFFA:0xFFC] = self.version.to_bytes(2, "little")
        out[0xFFC:] = self.usage.to_bytes(4, "little")
        return bytes(out)

    def reply_registers(self):
        """The registers that the recorded hypervisor marked valid."""
        after = self.qwords | self.reply
        valid = after.get(0x3F0, 0) | after.get(0x3F8, 0) << 64
        return {name: after.get(Ghcb.FIELDS[name].offset, 0) for name, bit in VALID_BITS.items() if valid & bit}


class Msr(NamedTuple):
    """One recorded request by the MSR, and the reply."""

    number: int
    request: int
    reply: int


class Vc(NamedTuple):
    """One recorded #VC."""

    number: int
    code: int
    insn: bytes
    regs: tuple[int, ...]
    rflags: int
    cpl: int

    def context(self, *, ghcb):
        """What the reference handler gets."""
        regs = Registers(**dict(zip(GPR_NAMES, self.regs, strict=True)), rflags=self.rflags)
        system = SystemRegisters(cpl=self.cpl, **LONG_MODE)
        return VcContext(code=self.code, insn=self.insn, regs=regs, system=system, ghcb=ghcb)


def number(text):
    return int(text, 16)


def qwords(mapping):
    return {int(offset, 16): int(value, 16) for offset, value in mapping.items()}


def exchanges():
    """(#VC or None, its requests): requests outside a #VC come with None."""
    with lzma.open(capture_set(NAME), "rt") as lines:
        vc, requests = None, []
        for line in lines:
            kind, count, *rest = json.loads(line)
            if kind == "vc":
                if vc is not None or requests:
                    yield vc, requests
                code, _rip, insn, regs, rflags, cpl = rest
                vc = Vc(count, code, bytes.fromhex(insn), tuple(map(number, regs)), number(rflags), cpl)
                requests = []
            elif kind == "msr":
                requests.append(Msr(count, number(rest[1]), number(rest[2])))
            else:
                _rip, gpa, before, version, usage, data, after, data_after = rest
                requests.append(
                    Page(
                        count,
                        number(gpa),
                        qwords(before),
                        version,
                        usage,
                        bytes.fromhex(data),
                        qwords(after),
                        bytes.fromhex(data_after),
                    )
                )
        yield vc, requests
