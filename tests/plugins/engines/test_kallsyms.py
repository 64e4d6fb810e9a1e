"""Function names: a System.map, and the table that a kernel carries, built here as Linux's scripts/kallsyms.c does."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sevlab.core.errors import ConfigError
from sevlab.plugins.engines import read_symbols
from sevlab.plugins.engines.kallsyms import kernel_symbols

TEXT = 0xFFFF_FFFF_8100_0000
PIECES = [b"ab" if code < 32 else bytes((code,)) if code < 127 else b"xen_" for code in range(256)]
"""The tokens: plain characters stand for themselves, all other codes for longer pieces."""


def aligned(data):
    return data + bytes(-len(data) % 8)


def table(symbols, *, seqs=b""):
    """The tables of 6.1 for (address, type and name), and something before and after them."""
    names, markers = b"", []
    for number, (_, name) in enumerate(symbols):
        if number % 256 == 0:
            markers.append(len(names))
        coded = bytes((0xFF,)) + name[5:] if name[1:5] == b"xen_" else name[1:]
        coded = name[:1] + coded
        length = len(coded)
        names += bytes((length,)) if length < 0x80 else bytes((length & 0x7F | 0x80, length >> 7))
        names += coded
    offsets = b"".join((TEXT - 1 - address).to_bytes(4, "little", signed=True) for address, _ in symbols)
    tokens = b"".join(piece + b"\0" for piece in PIECES)
    index, at = b"", 0
    for piece in PIECES:
        index += at.to_bytes(2, "little")
        at += len(piece) + 1
    return b"".join(
        (
            aligned(b"some code before it 0123456789"),
            TEXT.to_bytes(8, "little"),  # an address that is no base
            aligned(offsets),
            TEXT.to_bytes(8, "little"),
            len(symbols).to_bytes(8, "little"),
            aligned(names),
            aligned(b"".join(marker.to_bytes(4, "little") for marker in markers)),
            aligned(seqs),
            aligned(tokens),
            index,
            b"and after it",
        )
    )


NAMES = st.lists(st.text("abcxyz_019", min_size=1, max_size=200).map(str.encode), min_size=1, max_size=8, unique=True)


@settings(max_examples=25, deadline=None)
@given(NAMES, st.sampled_from([1, 255, 256, 257, 300]), st.binary(max_size=40))
def test_every_function_of_a_table_is_found(names, count, seqs):
    names = [b"%s_%d" % (names[number % len(names)], number) for number in range(count)]
    symbols = [(TEXT + 16 * number, b"T" + name) for number, name in enumerate(names)]
    found = kernel_symbols(table(symbols, seqs=seqs))
    for address, name in symbols:
        assert found.name(address) == name[1:].decode()
        assert found.name(address + 5) == name[1:].decode() + "+0x5"


def test_pieces_are_put_together_and_data_is_left_out():
    found = kernel_symbols(table([(TEXT, b"Txen_start"), (TEXT + 64, b"Ddata"), (TEXT + 128, b"tlocal")]))
    assert found.name(TEXT + 100) == "xen_start+0x64"
    assert found.address("local") == TEXT + 128
    assert found.address("data") is None


def test_an_image_without_a_table_has_no_names():
    assert not kernel_symbols(b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\x00" * 40)
    assert not kernel_symbols(b"")


def test_a_count_that_does_not_fit_the_names_is_no_table():
    image = bytearray(table([(TEXT + 16 * number, b"Tf%d" % number) for number in range(300)]))
    at = image.index((300).to_bytes(8, "little"))
    image[at : at + 8] = (299).to_bytes(8, "little")
    assert not kernel_symbols(bytes(image))


def test_far_below_the_next_function_is_no_name():
    found = kernel_symbols(table([(TEXT, b"Tstart")]))
    assert found.name(TEXT + (1 << 20)) == "start+0x100000"
    assert found.name(TEXT + (1 << 20) + 1) == ""
    assert found.name(TEXT - 1) == ""


def test_a_system_map_is_read_and_a_file_that_is_none_is_named(tmp_path):
    file = tmp_path / "System.map"
    file.write_text("ffffffff81000000 T _stext\nffffffff81000040 t inner\nffffffff82000000 D data\n")
    assert read_symbols(file).name(0xFFFF_FFFF_8100_0041) == "inner+0x1"
    file.write_text("ffffffffffffffff B The real System.map is elsewhere\n")
    with pytest.raises(ConfigError, match="expected a System.map"):
        read_symbols(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no text"):
        read_symbols(file)
