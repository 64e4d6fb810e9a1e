"""Names of a program's code from its ELF file."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from sevlab.plugins.engines.elf_symbols import elf_symbols
from sevlab.plugins.engines.symbols import Symbols


def test_the_flat_guests_functions_have_names(flat_elf):
    symbols = elf_symbols(flat_elf.read_bytes())
    main = symbols.address("main")
    assert symbols.name(main) == "main"
    assert symbols.name(main + 4) == "main+0x4"
    low, end = symbols.around(main + 4)
    assert low == main < end


@given(st.binary(max_size=300))
def test_any_bytes_are_names_or_none(data):
    assert isinstance(elf_symbols(b"\x7fELF" + data), Symbols)


def test_a_place_between_two_functions_is_around_the_first():
    symbols = Symbols([(0x1000, "first"), (0x2000, "second")])
    assert symbols.around(0x1FFF) == (0x1000, 0x2000)
    assert symbols.around(0x2000) == (0x2000, 0x2001)
    assert symbols.around(0xFFF) is None
