"""TCB_VERSION: the security patch levels of a platform's firmware, whose bytes mean other things on other parts.

Source: 56860, TCB_VERSION; google/go-sev-guest kds/kds.go; virtee/sev src/firmware/host/types/snp.rs.
"""

from __future__ import annotations

from typing import NamedTuple

from sevlab.core.layout import Layout, raw_bytes, u8

SOURCE = "56860, TCB_VERSION"


class TcbVersion(Layout, size=8):
    """TCB_VERSION of Milan and Genoa."""

    bootloader = u8(0, source=SOURCE)
    tee = u8(1, source=SOURCE)
    reserved_2 = raw_bytes(2, 4, must_be_zero=True, source=SOURCE)
    snp = u8(6, source=SOURCE)
    microcode = u8(7, source=SOURCE)


class TurinTcbVersion(Layout, size=8):
    """TCB_VERSION since Turin."""

    fmc = u8(0, source=SOURCE)
    bootloader = u8(1, source=SOURCE)
    tee = u8(2, source=SOURCE)
    snp = u8(3, source=SOURCE)
    reserved_4 = raw_bytes(4, 3, must_be_zero=True, source=SOURCE)
    microcode = u8(7, source=SOURCE)


class Tcb(NamedTuple):
    """Security patch levels by component; `fmc` is None on parts that have none."""

    bootloader: int
    tee: int
    snp: int
    microcode: int
    fmc: int | None = None

    @classmethod
    def of(cls, raw: int, generation: str) -> Tcb:
        """The components of the 64-bit number `raw` of a part of `generation` ("milan", "genoa", "turin")."""
        data = raw.to_bytes(8, "little")
        if generation == "turin":
            late = TurinTcbVersion.from_bytes(data)
            return cls(late.bootloader, late.tee, late.snp, late.microcode, late.fmc)
        early = TcbVersion.from_bytes(data)
        return cls(early.bootloader, early.tee, early.snp, early.microcode)

    def raw(self) -> int:
        """The 64-bit number."""
        levels = self._asdict()
        if self.fmc is None:
            del levels["fmc"]
            return int.from_bytes(TcbVersion.build(**levels), "little")
        return int.from_bytes(TurinTcbVersion.build(**levels), "little")

    def at_most(self, other: Tcb) -> bool:
        """Whether no component is above the other's: the comparison of the ABI, which is not that of the numbers."""
        return all(mine <= theirs for mine, theirs in zip(self._levels(), other._levels(), strict=True))

    def _levels(self) -> tuple[int, ...]:
        return (self.bootloader, self.tee, self.snp, self.microcode, self.fmc or 0)

    def __str__(self) -> str:
        named = [f"{name} {level}" for name, level in self._asdict().items() if level is not None]
        return ", ".join(named)
