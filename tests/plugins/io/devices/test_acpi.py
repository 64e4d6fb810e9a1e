"""ACPI tables: offsets as ACPI 6.4 prints them, checksums, and that they say what the board is."""

from __future__ import annotations

import pytest
from sevlab.plugins.io import acpi_tables
from sevlab.plugins.io.devices.acpi import LAYOUTS, definition_block

BASE = 0x9_8000


def u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def tables(cpus: int) -> dict[str, bytes]:
    data = acpi_tables(BASE, cpus=cpus)
    xsdt = int.from_bytes(data[24:32], "little") - BASE
    pointers = data[xsdt + 36 : xsdt + u32(data, xsdt + 4)]
    found = {"XSDT": data[xsdt : xsdt + u32(data, xsdt + 4)]}
    for at in range(0, len(pointers), 8):
        start = int.from_bytes(pointers[at : at + 8], "little") - BASE
        found[data[start : start + 4].decode()] = data[start : start + u32(data, start + 4)]
    for name, offset in (("FACS", 36), ("DSDT", 40)):
        start = u32(found["FACP"], offset) - BASE
        found[name] = data[start : start + u32(data, start + 4)]
    return found


def test_the_root_pointer_has_both_checksums():
    data = acpi_tables(BASE, cpus=1)
    assert data[:8] == b"RSD PTR "
    assert not sum(data[:20]) & 0xFF
    assert not sum(data[:36]) & 0xFF


@pytest.mark.parametrize("cpus", [1, 2, 255])
def test_every_table_sums_to_zero_and_is_as_long_as_it_says(cpus):
    for name, table in tables(cpus).items():
        assert table[:4].decode() == name
        assert len(table) == u32(table, 4)
        if name != "FACS":
            assert not sum(table) & 0xFF


def test_the_fixed_description_names_the_pm_block():
    fadt = tables(1)["FACP"]
    assert len(fadt) == 276
    assert (u32(fadt, 56), u32(fadt, 64), u32(fadt, 76)) == (0x600, 0x604, 0x608)
    assert (fadt[88], fadt[89], fadt[91]) == (4, 2, 4)
    assert not u32(fadt, 48)  # no SMI command: the machine is in ACPI mode already
    assert not u32(fadt, 112) & 1 << 8  # a timer of 24 bits


def test_the_controllers_are_those_of_the_board():
    madt = tables(2)["APIC"]
    assert u32(madt, 36) == 0xFEE0_0000
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert [entry[0] for entry in entries] == [0, 0, 1, 2, 2, 4]
    assert [entry[3] for entry in entries[:2]] == [0, 1]  # APIC IDs
    assert u32(entries[2], 4) == 0xFEC0_0000
    assert (entries[3][3], u32(entries[3], 4)) == (0, 2)  # the 8254 is at pin 2
    assert (entries[4][3], u32(entries[4], 4), entries[4][8]) == (9, 9, 0xD)


def test_s5_is_a_package_of_four_numbers():
    assert definition_block() == bytes.fromhex("08 5c5f53355f 12 06 04 00000000")


def test_layouts_are_as_long_as_the_specification_says():
    sizes = {layout.__name__: layout.SIZE for layout in LAYOUTS}
    assert sizes == {
        "Rsdp": 36, "TableHeader": 36, "Fadt": 276, "Facs": 64, "Madt": 44, "MadtLocalApic": 8, "MadtIoApic": 12,
        "MadtOverride": 10, "MadtNmi": 6,
    }  # fmt: skip
