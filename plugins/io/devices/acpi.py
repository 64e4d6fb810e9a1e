"""ACPI tables of the board: what a kernel must be told before it uses the APICs, the PM timer and S5.

Source: ACPI 6.4, 5.2 (tables), 7.4.2 (S5), 20.2 (AML encoding). The values are those of the devices beside.
"""

from __future__ import annotations

from sevlab.core.layout import Layout, raw_bytes, u8, u16, u32, u64
from sevlab.plugins.io.devices import acpi_pm, ioapic, lapic, pit, rtc

HEADER_BYTES = 36
OEM, TABLE, CREATOR = b"SEVLAB", b"BOARD   ", b"SEVL"
ALIGNED = 64
SCI_IRQ = 9
ACTIVE_HIGH_LEVEL = 0xD
NO_C2, NO_C3 = 0xFFF, 0xFFF
ALL_PROCESSORS, LINT1 = 0xFF, 1


class Rsdp(Layout, size=36):
    """Root system description pointer."""

    signature = raw_bytes(0, 8, source="ACPI 6.4, 5.2.5.3")
    checksum = u8(8, doc="of the first 20 bytes", source="ACPI 6.4, 5.2.5.3")
    oem_id = raw_bytes(9, 6, source="ACPI 6.4, 5.2.5.3")
    revision = u8(15, source="ACPI 6.4, 5.2.5.3")
    length = u32(20, unit="bytes", source="ACPI 6.4, 5.2.5.3")
    xsdt_address = u64(24, doc="GPA", source="ACPI 6.4, 5.2.5.3")
    extended_checksum = u8(32, doc="of all bytes", source="ACPI 6.4, 5.2.5.3")


class TableHeader(Layout, size=HEADER_BYTES):
    """What every table but the FACS starts with."""

    signature = raw_bytes(0, 4, source="ACPI 6.4, 5.2.6")
    length = u32(4, unit="bytes", source="ACPI 6.4, 5.2.6")
    revision = u8(8, source="ACPI 6.4, 5.2.6")
    checksum = u8(9, doc="the sum of all bytes is 0", source="ACPI 6.4, 5.2.6")
    oem_id = raw_bytes(10, 6, source="ACPI 6.4, 5.2.6")
    oem_table_id = raw_bytes(16, 8, source="ACPI 6.4, 5.2.6")
    oem_revision = u32(24, source="ACPI 6.4, 5.2.6")
    creator_id = raw_bytes(28, 4, source="ACPI 6.4, 5.2.6")
    creator_revision = u32(32, source="ACPI 6.4, 5.2.6")


class Fadt(Layout, size=276):
    """Fixed description: the PM block and what the machine lacks. Behind its header."""

    facs = u32(36, doc="GPA", source="ACPI 6.4, 5.2.9")
    dsdt = u32(40, doc="GPA", source="ACPI 6.4, 5.2.9")
    sci_interrupt = u16(46, source="ACPI 6.4, 5.2.9")
    pm1a_event_block = u32(56, doc="port", source="ACPI 6.4, 5.2.9")
    pm1a_control_block = u32(64, doc="port", source="ACPI 6.4, 5.2.9")
    pm_timer_block = u32(76, doc="port", source="ACPI 6.4, 5.2.9")
    pm1_event_length = u8(88, unit="bytes", source="ACPI 6.4, 5.2.9")
    pm1_control_length = u8(89, unit="bytes", source="ACPI 6.4, 5.2.9")
    pm_timer_length = u8(91, unit="bytes", source="ACPI 6.4, 5.2.9")
    c2_latency = u16(96, doc="above 100: no C2", unit="us", source="ACPI 6.4, 5.2.9")
    c3_latency = u16(98, doc="above 1000: no C3", unit="us", source="ACPI 6.4, 5.2.9")
    century = u8(108, doc="CMOS index", source="ACPI 6.4, 5.2.9")
    boot_architecture = u16(109, doc="0 legacy devices, 1 8042, 2 no VGA", source="ACPI 6.4, 5.2.9.3")
    flags = u32(112, doc="0 WBINVD, 2 C1, 4 and 5 no fixed buttons, 6 no fixed RTC", source="ACPI 6.4, 5.2.9")
    minor_version = u8(131, source="ACPI 6.4, 5.2.9")
    x_dsdt = u64(140, doc="GPA", source="ACPI 6.4, 5.2.9")


class Facs(Layout, size=64):
    """Firmware control structure: nothing but its name, since nothing here sleeps and wakes."""

    signature = raw_bytes(0, 4, source="ACPI 6.4, 5.2.10")
    length = u32(4, unit="bytes", source="ACPI 6.4, 5.2.10")
    version = u8(32, source="ACPI 6.4, 5.2.10")


class Madt(Layout, size=44):
    """Interrupt controllers; the entries follow."""

    local_apic = u32(36, doc="GPA", source="ACPI 6.4, 5.2.12")
    flags = u32(40, doc="0: 8259s are there too", source="ACPI 6.4, 5.2.12")


class MadtLocalApic(Layout, size=8):
    """One processor."""

    kind = u8(0, source="ACPI 6.4, 5.2.12.2")
    length = u8(1, source="ACPI 6.4, 5.2.12.2")
    processor = u8(2, source="ACPI 6.4, 5.2.12.2")
    apic_id = u8(3, source="ACPI 6.4, 5.2.12.2")
    flags = u32(4, doc="0 enabled", source="ACPI 6.4, 5.2.12.2")


class MadtIoApic(Layout, size=12):
    """The I/O APIC."""

    kind = u8(0, source="ACPI 6.4, 5.2.12.3")
    length = u8(1, source="ACPI 6.4, 5.2.12.3")
    identifier = u8(2, source="ACPI 6.4, 5.2.12.3")
    address = u32(4, doc="GPA", source="ACPI 6.4, 5.2.12.3")
    first_interrupt = u32(8, source="ACPI 6.4, 5.2.12.3")


class MadtOverride(Layout, size=10):
    """An ISA interrupt that arrives at another pin, or otherwise than ISA's do."""

    kind = u8(0, source="ACPI 6.4, 5.2.12.5")
    length = u8(1, source="ACPI 6.4, 5.2.12.5")
    irq = u8(3, source="ACPI 6.4, 5.2.12.5")
    pin = u32(4, source="ACPI 6.4, 5.2.12.5")
    flags = u16(8, doc="1:0 polarity, 3:2 trigger; 0: as the bus", source="ACPI 6.4, 5.2.12.5")


class MadtNmi(Layout, size=6):
    """The local interrupt pin that is NMI."""

    kind = u8(0, source="ACPI 6.4, 5.2.12.7")
    length = u8(1, source="ACPI 6.4, 5.2.12.7")
    processor = u8(2, doc="FFh: all", source="ACPI 6.4, 5.2.12.7")
    flags = u16(3, source="ACPI 6.4, 5.2.12.7")
    pin = u8(5, doc="0 LINT0, 1 LINT1", source="ACPI 6.4, 5.2.12.7")


LAYOUTS: tuple[type[Layout], ...] = (
    Rsdp, TableHeader, Fadt, Facs, Madt, MadtLocalApic, MadtIoApic, MadtOverride, MadtNmi,
)  # fmt: skip

NAME_OP, PACKAGE_OP, ZERO_OP, BYTE_PREFIX = b"\x08", b"\x12", b"\x00", b"\x0a"


def _aml_byte(value: int) -> bytes:
    return BYTE_PREFIX + bytes((value,)) if value else ZERO_OP


def _aml_package(elements: tuple[bytes, ...]) -> bytes:
    """A package whose length fits the short form: below 64 bytes. Source: ACPI 6.4, 20.2.4 and 20.2.5.4."""
    body = bytes((len(elements),)) + b"".join(elements)
    return PACKAGE_OP + bytes((len(body) + 1,)) + body


def definition_block() -> bytes:
    r"""AML of the DSDT: \_S5, the value for SLP_TYP that powers off. Source: ACPI 6.4, 7.4.2."""
    return NAME_OP + b"\\_S5_" + _aml_package((_aml_byte(acpi_pm.SLEEP_TYPE_S5),) * 4)


def acpi_tables(base_gpa: int, *, cpus: int) -> bytes:
    """RSDP, XSDT, FADT, FACS, DSDT and MADT of a board with `cpus` processors, for `base_gpa` (where the RSDP is)."""
    data = bytearray(Rsdp.SIZE)

    def place(table: bytes) -> int:
        data.extend(bytes(-len(data) % ALIGNED))
        data.extend(table)
        return base_gpa + len(data) - len(table)

    facs = place(Facs.build(signature=b"FACS", length=Facs.SIZE, version=2))
    dsdt = place(_table(b"DSDT", 2, definition_block()))
    pm = acpi_pm.PM_PORT
    fadt = Fadt.build(
        facs=facs,
        dsdt=dsdt,
        x_dsdt=dsdt,
        sci_interrupt=SCI_IRQ,
        pm1a_event_block=pm + acpi_pm.STATUS,
        pm1_event_length=4,
        pm1a_control_block=pm + acpi_pm.CONTROL,
        pm1_control_length=2,
        pm_timer_block=pm + acpi_pm.TIMER,
        pm_timer_length=4,
        c2_latency=NO_C2,
        c3_latency=NO_C3,
        century=rtc.CENTURY,
        boot_architecture=1 << 0 | 1 << 2,
        flags=1 << 0 | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6,
        minor_version=4,
    )
    tables = (place(_table(b"FACP", 6, fadt[HEADER_BYTES:])), place(_table(b"APIC", 5, _madt(cpus))))
    xsdt = place(_table(b"XSDT", 1, b"".join(table.to_bytes(8, "little") for table in tables)))
    pointer = Rsdp.build(signature=b"RSD PTR ", oem_id=OEM, revision=2, length=Rsdp.SIZE, xsdt_address=xsdt)
    pointer = Rsdp.patch(pointer, checksum=_checksum(pointer[:20]))
    data[: Rsdp.SIZE] = Rsdp.patch(pointer, extended_checksum=_checksum(pointer))
    return bytes(data)


def _madt(cpus: int) -> bytes:
    """Behind the header."""
    parts = [Madt.build(local_apic=lapic.LAPIC_GPA, flags=1)[HEADER_BYTES:]]
    parts += [
        MadtLocalApic.build(kind=0, length=MadtLocalApic.SIZE, processor=number, apic_id=number, flags=1)
        for number in range(cpus)
    ]
    parts.append(MadtIoApic.build(kind=1, length=MadtIoApic.SIZE, address=ioapic.IOAPIC_GPA))
    for irq, pin, flags in ((pit.PIT_IRQ, ioapic.PIT_PIN, 0), (SCI_IRQ, SCI_IRQ, ACTIVE_HIGH_LEVEL)):
        parts.append(MadtOverride.build(kind=2, length=MadtOverride.SIZE, irq=irq, pin=pin, flags=flags))
    parts.append(MadtNmi.build(kind=4, length=MadtNmi.SIZE, processor=ALL_PROCESSORS, pin=LINT1))
    return b"".join(parts)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    header = TableHeader.build(
        signature=signature,
        length=HEADER_BYTES + len(body),
        revision=revision,
        oem_id=OEM,
        oem_table_id=TABLE,
        oem_revision=1,
        creator_id=CREATOR,
        creator_revision=1,
    )
    return TableHeader.patch(header, checksum=_checksum(header + body)) + body


def _checksum(data: bytes) -> int:
    return -sum(data) & 0xFF
