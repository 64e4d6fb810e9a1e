"""Names of a program's functions and labels, from the symbol table of its ELF file.

Source: ELF-64 object file format 1.5, sections and symbol table.
"""

from __future__ import annotations

from struct import Struct, error, unpack_from

from sevlab.plugins.engines.symbols import Symbols

SECTION = Struct("<IIQQQQIIQQ")
SYMBOL = Struct("<IBBHQQ")
SECTIONS_AT, SECTION_SIZE_AT = 40, 58
SHT_SYMTAB, STT_FUNC, STT_NOTYPE = 2, 2, 0


def elf_symbols(data: bytes) -> Symbols:
    """The functions and labels, none where the file has no table or is none."""
    found: list[tuple[int, str]] = []
    try:
        (at,), (size, count) = unpack_from("<Q", data, SECTIONS_AT), unpack_from("<HH", data, SECTION_SIZE_AT)
        sections = [SECTION.unpack_from(data, at + number * size) for number in range(count)]
        for _, kind, _, _, start, length, link, _, _, _ in sections:
            if kind != SHT_SYMTAB or link >= len(sections):
                continue
            names = sections[link][4]
            for place in range(start, start + length, SYMBOL.size):
                name, info, _, section, value, _ = SYMBOL.unpack_from(data, place)
                if info & 15 in (STT_FUNC, STT_NOTYPE) and section and name:
                    text = data[names + name : data.index(b"\0", names + name)].decode("ascii", "replace")
                    found.append((value, text))
    except (error, ValueError):
        return Symbols()
    return Symbols(found)
