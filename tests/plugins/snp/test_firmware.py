"""Firmware images: what the table says, and a precise refusal for every image that is cut or changed."""

from __future__ import annotations

import hashlib
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.errors import FormatError
from sevlab.plugins.snp.firmware import (
    FOOTER,
    FOUR_GIB,
    SEV_ES_RESET_BLOCK,
    SEV_HASH_TABLE,
    SEV_METADATA,
    SVSM_INFO,
    Section,
    SectionType,
    parse_firmware,
)


def image(entries, *, sections=None, size=0x2000, footer_length=None, header=None):
    """An image with these (GUID, data) entries from above, and metadata 1024 bytes before its end."""
    data = bytearray(hashlib.sha256(b"image").digest() * (size // 32))
    if sections is not None:
        entries = [*entries, (SEV_METADATA, (1024).to_bytes(4, "little"))]
        body = b"".join(word.to_bytes(4, "little") for section in sections for word in section)
        head = header or b"ASEV" + b"".join(n.to_bytes(4, "little") for n in (16 + len(body), 1, len(sections)))
        data[size - 1024 : size - 1024 + len(head) + len(body)] = head + body
    table = b""
    for guid, value in entries:
        table = value + (len(value) + 18).to_bytes(2, "little") + uuid.UUID(guid).bytes_le + table
    length = footer_length if footer_length is not None else len(table) + 18
    table += length.to_bytes(2, "little") + uuid.UUID(FOOTER).bytes_le
    data[size - 32 - len(table) : size - 32] = table
    return bytes(data)


SECTIONS = [(0x800000, 0x9000, 1), (0x80D000, 0x1000, 2), (0x80E000, 0x1000, 3), (0x80F000, 0x1000, 0x10)]
ENTRIES = [
    (SEV_ES_RESET_BLOCK, (0x80B004).to_bytes(4, "little")),
    (SEV_HASH_TABLE, (0x80FC00).to_bytes(4, "little") + (0x400).to_bytes(4, "little")),
    (SVSM_INFO, (0x100).to_bytes(4, "little")),
]
GOOD = image(ENTRIES, sections=SECTIONS)


def test_an_image_is_read_with_its_table_and_metadata():
    firmware = parse_firmware(GOOD, "ovmf")
    assert firmware.start_gpa == FOUR_GIB - len(GOOD)
    assert firmware.reset_eip == 0x80B004
    assert firmware.hash_table_gpa == 0x80FC00
    assert [section[:3] for section in firmware.sections] == SECTIONS
    assert firmware.sections[1] == Section(0x80D000, 0x1000, 2, offset=0x2000 - 1024 + 16 + 12)
    assert firmware.has_section(SectionType.KERNEL_HASHES)
    assert not firmware.has_section(SectionType.SVSM_CAA)
    low = parse_firmware(GOOD, "svsm", end_gpa=0xFFC0_0000)
    assert low.svsm_eip == 0xFFC0_0000 - len(GOOD) + 0x100


@pytest.mark.parametrize("data", [b"", b"x" * 49, bytes(4096), b"\xff" * 4096], ids=range(4))
def test_an_image_without_a_footer_has_an_empty_table(data):
    firmware = parse_firmware(data, "plain")
    assert (firmware.table, firmware.sections) == ({}, ())
    for what in ("reset_eip", "svsm_eip", "hash_table_gpa"):
        with pytest.raises(FormatError, match="plain: offset 0x.*table entry .* found no such entry"):
            getattr(firmware, what)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (image([], footer_length=17), r"offset 0x1fce, length of the GUID table: expected 0x12 to 0x1fe0 bytes, found"),
        (image([], footer_length=0x1FE1), "length of the GUID table"),
        (image(ENTRIES[:1], footer_length=39), r"length of table entry 00f771de.*: expected 0x12 to 0x15 bytes"),
        (image([ENTRIES[0], ENTRIES[0]]), r"table entry 00f771de.*: expected once, found a second time"),
        (image([(SEV_METADATA, b"\0\4")]), r"table entry dc886566.*: expected 4 bytes, found 2"),
        (image([(SEV_METADATA, b"\1\x20\0\0")]), r"offset of the SEV metadata: .* found 0x2001 before the end"),
        (image([(SEV_METADATA, b"\x0f\0\0\0")]), r"MetadataHeader\.sections: expected 0x10 bytes from offset 0x1ff1"),
        (image([], sections=SECTIONS, header=b"ASEX" + bytes([64, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0])), "signature"),
        (image([], sections=SECTIONS, header=b"ASEV" + bytes([64, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0])), "_version"),
        (
            image([], sections=SECTIONS, header=b"ASEV" + bytes([63, 0, 0, 0, 1, 0, 0, 0, 4, 0, 0, 0])),
            r"offset 0x1c04, MetadataHeader.length: expected at least 0x40 for 4 sections, found 0x3f",
        ),
        (image([], sections=[(0x800001, 0x1000, 1)]), r"offset 0x1c10, MetadataSection.gpa: expected a multiple of"),
        (
            image([], sections=[], header=b"ASEV" + bytes([0, 5, 0, 0, 1, 0, 0, 0, 100, 0, 0, 0])),
            r"MetadataSection\.",
        ),
    ],
    ids=range(12),
)
def test_a_damaged_table_or_metadata_is_refused_with_offset_and_field(data, message):
    with pytest.raises(FormatError, match=message) as error:
        parse_firmware(data, "ovmf")
    assert error.value.name == "ovmf"
    assert 0 <= error.value.offset <= len(data)


def test_a_hash_table_at_address_zero_means_not_supported():
    firmware = parse_firmware(image([(SEV_HASH_TABLE, bytes(8))]), "ovmf")
    with pytest.raises(FormatError, match="expected an address, found 0: not supported"):
        _ = firmware.hash_table_gpa


@given(st.data())
def test_any_change_of_an_image_reads_or_is_refused(data):
    changed = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0x1BF0, 0x1C50) | st.integers(0x1F60, 0x1FFF))
        changed[place] = data.draw(st.integers(0, 255))
    cut = bytes(changed)[data.draw(st.integers(0, 0x2000)) :] if data.draw(st.booleans()) else bytes(changed)
    refusal = None
    try:
        firmware = parse_firmware(cut, "f")
    except FormatError as error:
        refusal = error
    else:
        assert firmware.data == cut
    assert refusal is None or 0 <= refusal.offset <= len(cut)
