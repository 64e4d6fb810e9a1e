"""What differs between generations of parts, as one table.

Source: spec 24593, 15.34; Linux arch/x86/kvm/svm and drivers/crypto/ccp. Except Genoa's numbers (read from a CPUID
dump of an EPYC 9654 and from its published firmware) the maximum ASIDs and the cipher are UNVERIFIED: no document
names them for the part.
"""

from __future__ import annotations

from typing import NamedTuple


class Generation(NamedTuple):
    """`key_bits`: AES key size of memory encryption; `c_bit`: its position; `lost_bits`: physical address bits that
    encryption takes away; `physical_bits`: width before that; `max_asid`: encrypted guests at a time; `vmpls`: number
    of VMPLs (0: no SNP); `asp_device`: PCI device id of the ASP; `coherent`: CPUID Fn8000_001F EAX[10].
    """

    name: str
    key_bits: int
    c_bit: int
    lost_bits: int
    physical_bits: int
    max_asid: int
    vmpls: int
    asp_device: int
    coherent: bool


GENERATIONS = {
    generation.name: generation
    for generation in (
        Generation("naples", 128, 47, 5, 48, 15, 0, 0x1456, coherent=False),
        Generation("rome", 128, 47, 5, 48, 509, 0, 0x1486, coherent=False),
        Generation("milan", 128, 51, 5, 48, 509, 4, 0x1486, coherent=True),
        Generation("genoa", 128, 51, 6, 52, 1006, 4, 0x14CA, coherent=True),
        Generation("turin", 256, 51, 6, 52, 1006, 4, 0x17D8, coherent=True),
        # No part of AMD's: a Milan whose C-bit lies within 40 bits, for engines that walk guests' tables themselves.
        Generation("narrow", 128, 39, 1, 40, 509, 4, 0x1486, coherent=True),
    )
}
