"""MMIO through nested page faults, in every mode: with and without decode assist, and the corners of it."""

from __future__ import annotations

import pytest
from sevlab.core.builder import MmioWindow
from sevlab.core.config import GuestConfig
from sevlab.core.cpu import CONTROL_SEV, CONTROL_SEV_ES
from sevlab.core.events import (
    CpuExit,
    Injected,
    MapFlag,
    MemoryRead,
    MemoryWrite,
    NptEdit,
    Party,
    Resumed,
    SetRegisters,
    Space,
    Stopped,
)
from sevlab.core.hookspecs import hookimpl
from sevlab.core.svm import EventType, ExitCode, NpfError, Vector, event
from sevlab.core.testing import make_machine
from sevlab.plugins import io
from sevlab.plugins.io.coverage import COLUMNS, MATRIX, Form, form_of, markdown_table
from sevlab.plugins.io.mmio import MAX_ELEMENTS

DEVICE = 0xD000_0000
READ, WRITE = NpfError.U | NpfError.FINAL, NpfError.U | NpfError.W | NpfError.FINAL
SMEP, SMAP = 1 << 20, 1 << 21
ENCRYPTED = {io.Mode.PLAIN: 0, io.Mode.SEV: CONTROL_SEV, io.Mode.SEV_ES: CONTROL_SEV | CONTROL_SEV_ES}


class Window:
    """16 pages of memory that is a device: keeps bytes, and every access."""

    def __init__(self) -> None:
        self.seen = []
        self.content = {}

    @hookimpl
    def sevlab_register(self, builder):
        builder.mmio(MmioWindow(DEVICE, 0x10000, self.read, self.write))

    def read(self, _machine, _vcpu, offset, width):
        self.seen.append(("r", offset, width))
        return int.from_bytes(bytes(self.content.get(offset + n, 0) for n in range(width)), "little")

    def write(self, _machine, _vcpu, offset, width, value):
        self.seen.append(("w", offset, width, value))
        self.content.update({offset + n: byte for n, byte in enumerate(value.to_bytes(width, "little"))})


def make(mode=io.Mode.PLAIN):
    """A guest in 64-bit code without paging of its own: linear addresses are physical ones, as of a flat guest."""
    device = Window()
    machine = make_machine("io", given={"x": device}, guests=(GuestConfig(memory_bytes=1 << 20),))
    vcpu = machine.vcpus[0]
    vcpu.vmcb.encryption_control |= ENCRYPTED[mode]
    vcpu.system.cs = (8, 0x29B, 0xFFFF_FFFF, 0)
    registers(machine, rdi=DEVICE + 0x20, rsi=0x8000, rip=0x1000, rsp=0x7000)
    return machine, device


def registers(machine, **values):
    machine.apply(SetRegisters(0, tuple(values.items())))
    return machine.vcpus[0].regs


def fault(machine, insn=b"", gpa=DEVICE + 0x20, error=WRITE):
    return machine.apply(CpuExit(0, ExitCode.NPF, error, gpa, insn, 0))


def store(machine, gpa, data):
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, gpa, False, data))


def read(machine, gpa, length):
    return machine.apply(MemoryRead(Party.GUEST, 0, Space.GPA, gpa, False, length)).records[0].data


@pytest.mark.parametrize("mode", [io.Mode.PLAIN, io.Mode.SEV])
def test_a_store_and_a_load_with_decode_assist(mode):
    machine, device = make(mode)
    regs = registers(machine, rax=0x1122_3344_5566_7788)
    fault(machine, b"\x89\x07\x90\x90")  # mov [rdi],eax and what follows it
    assert device.seen == [("w", 0x20, 4, 0x5566_7788)]
    assert regs.rip == 0x1002
    outcome = fault(machine, b"\x48\x8b\x1f", error=READ)
    assert (regs.rbx, regs.rip) == (0x5566_7788, 0x1005)
    assert outcome.first(io.MmioAccessed) == io.MmioAccessed(DEVICE + 0x20, 8, False, 0x5566_7788)


def test_an_encrypted_guests_fault_is_never_decoded():
    machine, device = make(io.Mode.SEV_ES)
    outcome = fault(machine, b"\x89\x07")
    assert device.seen == []
    assert outcome.first(Resumed).rip == 0x1000
    assert outcome.first(io.Unserved) is None


def test_without_decode_assist_a_plain_guests_bytes_are_fetched():
    machine, device = make()
    store(machine, 0x1000, b"\x88\x07")
    registers(machine, rax=0x41)
    fault(machine)
    assert device.seen == [("w", 0x20, 1, 0x41)]


def test_a_fetch_stops_at_the_end_of_what_is_mapped():
    machine, device = make()
    paging(machine, 2)
    store(machine, 0x1FFE, b"\x88\x07")
    registers(machine, rip=0x1FFE, rdi=0x8020)
    fault(machine)
    assert device.seen == [("w", 0x20, 1, 0)]
    registers(machine, rip=0x1FFF)
    assert "not complete" in fault(machine).first(io.Unserved).reason


def test_bytes_that_decode_assist_cut_off_are_fetched_too():
    machine, device = make()
    store(machine, 0x1000, b"\xc7\x07\x78\x56\x34\x12")
    fault(machine, b"\xc7\x07\x78")
    assert device.seen == [("w", 0x20, 4, 0x1234_5678)]
    machine, device = make(io.Mode.SEV)
    assert "not complete" in fault(machine, b"\xc7\x07\x78").first(io.Unserved).reason
    assert device.seen == []


def paging(machine, *missing):
    """One to one for the first 2 MiB but the pages `missing`; page 8 leads to the device."""
    for place, entry in ((0x10000, 0x11007), (0x11000, 0x12007), (0x12000, 0x13007)):
        store(machine, place, entry.to_bytes(8, "little"))
    entries = {page: page << 12 | 7 for page in range(512) if page not in missing} | {8: DEVICE | 7}
    store(machine, 0x13000, b"".join(entries.get(page, 0).to_bytes(8, "little") for page in range(512)))
    registers(machine, cr0=0x8000_0011, cr3=0x10000, cr4=0x20, efer=0x1500)


@pytest.mark.parametrize(
    ("insn", "vector", "error"),
    [
        (b"\xf0\x89\x07", Vector.UD, None),  # LOCK MOV
        (b"\xf0\x01\xc0", Vector.UD, None),  # LOCK without memory
        (b"\x66" * 14 + b"\x89\x07", Vector.GP, 0),  # 16 bytes
        (b"\x2e" * 8 + b"\x36" * 8 + b"\x89\x07", Vector.GP, 0),
        (b"\x66" * 12 + b"\x0f\x04\xff", Vector.UD, None),  # 15 bytes are enough to see that it is none
        (b"\x06\x90", Vector.UD, None),  # PUSH ES in 64-bit code
    ],
)
@pytest.mark.parametrize("mode", [io.Mode.PLAIN, io.Mode.SEV])
def test_illegal_instructions_fault_in_the_guest(mode, insn, vector, error):
    machine, device = make(mode)
    outcome = fault(machine, insn)
    assert outcome.first(Injected).event == event(vector, EventType.EXCEPTION, error)
    assert device.seen == []
    assert machine.vcpus[0].regs.rip == 0x1000


@pytest.mark.parametrize("error", [READ & ~NpfError.FINAL | NpfError.TABLE_WALK, READ | NpfError.ID])
@pytest.mark.parametrize("mode", list(io.Mode))
def test_a_page_table_or_a_fetch_in_a_device_is_resumed_without_a_guess(mode, error):
    machine, device = make(mode)
    outcome = fault(machine, b"\x89\x07", error=error)
    assert device.seen == []
    assert outcome.first(Resumed).rip == 0x1000
    assert outcome.first(Injected) is None


@pytest.mark.parametrize(
    ("cr4", "cpl", "end"),
    [
        (0, 0, "again"),
        (SMEP, 3, "again"),
        (SMAP | SMEP, 0, "again"),
        (SMAP, 0, "triple fault"),
        (SMAP, 3, "#GP"),
        (SMAP | SMEP, 3, "#GP"),
    ],
)
def test_no_instruction_bytes_from_an_sev_guest_is_the_smap_erratum_or_nothing(cr4, cpl, end):
    machine, device = make(io.Mode.SEV)
    registers(machine, cr4=cr4, cpl=cpl)
    outcome = fault(machine)
    assert device.seen == []
    if end == "triple fault":
        assert "1096" in outcome.first(Stopped).reason
    else:
        assert outcome.first(Resumed).rip == 0x1000
        injected = outcome.first(Injected)
        assert (injected and injected.event) == (event(Vector.GP, EventType.EXCEPTION, 0) if end == "#GP" else None)


def test_a_plain_guest_whose_code_is_gone_cannot_be_served():
    machine, _ = make()
    paging(machine, 1)
    assert "fetched" in fault(machine).first(io.Unserved).reason


# Two operands ----------------------------------------------------------------------------------------------------


def test_movs_between_memory_and_a_device():
    machine, device = make()
    store(machine, 0x8000, b"\1\2\3\4")
    regs = registers(machine, rcx=4)
    fault(machine, b"\xf3\xa4")
    assert device.content == {0x20 + n: n + 1 for n in range(4)}
    assert (regs.rcx, regs.rsi, regs.rdi, regs.rip) == (0, 0x8004, DEVICE + 0x24, 0x1002)


def test_a_push_from_a_device():
    machine, device = make()
    device.content = {0x20: 0x55}
    fault(machine, b"\xff\x37", error=READ)
    assert read(machine, 0x6FF8, 8) == b"\x55" + bytes(7)
    assert machine.vcpus[0].regs.rsp == 0x6FF8


def test_a_call_and_a_jump_through_a_device():
    machine, device = make()
    device.content = dict(zip(range(0x20, 0x28), (0x4000).to_bytes(8, "little"), strict=True))
    regs = registers(machine, rip=0x1000)
    fault(machine, b"\xff\x17", error=READ)
    assert (regs.rip, regs.rsp, read(machine, 0x6FF8, 8)) == (0x4000, 0x6FF8, (0x1002).to_bytes(8, "little"))
    fault(machine, b"\xff\x27", error=READ)
    assert (regs.rip, regs.rsp) == (0x4000, 0x6FF8)


@pytest.mark.parametrize(
    ("insn", "reason"),
    [
        (b"\xa4", "second operand"),
        (b"\xff\x37", "second operand"),
        (b"\x66\x0f\x38\xf8\x07", "second operand"),
        (b"\x6e", "virtual address"),
        (b"\x0f\xb1\x07", "read-modify-write"),
        (b"\xf3\xaa", "repeated"),
    ],
)
def test_what_an_sev_guests_hypervisor_cannot_do_is_said_and_nothing_is_touched(insn, reason):
    machine, device = make(io.Mode.SEV)
    before = machine.vcpus[0].regs._capture(machine.vcpus[0].regs)
    outcome = fault(machine, insn)
    assert reason in outcome.first(io.Unserved).reason
    assert outcome.first(Stopped) is not None
    assert device.seen == []
    assert machine.vcpus[0].regs._capture(machine.vcpus[0].regs) == before


def test_an_operand_that_crosses_a_page_or_is_elsewhere_is_refused_for_sev():
    machine, device = make(io.Mode.SEV)
    registers(machine, rdi=DEVICE + 0xFFE)
    assert "crosses a page" in fault(machine, b"\x89\x07", gpa=DEVICE + 0xFFE).first(io.Unserved).reason
    machine, device = make(io.Mode.SEV)
    assert "not at the operand" in fault(machine, b"\x89\x07", gpa=DEVICE + 0x24).first(io.Unserved).reason
    assert device.seen == []


def test_a_plain_guests_operand_across_pages_is_two_accesses():
    machine, device = make()
    registers(machine, rdi=DEVICE + 0xFFE, rax=0x4433_2211)
    fault(machine, b"\x89\x07", gpa=DEVICE + 0xFFE)
    assert device.seen == [("w", 0xFFE, 2, 0x2211), ("w", 0x1000, 2, 0x4433)]


def test_a_bit_far_from_the_operand_is_in_the_page_of_the_fault():
    machine, device = make(io.Mode.SEV)
    registers(machine, rdi=0x50_0000, rax=8 * 0x1000 + 3)
    fault(machine, b"\x48\x0f\xab\x07", gpa=DEVICE + 0x1000)
    assert device.seen == [("r", 0x1000, 8), ("w", 0x1000, 8, 8)]


def test_sixteen_bytes_are_two_device_accesses():
    machine, device = make()
    machine.vcpus[0].system.xmm = (0x1111 << 64 | 0x2222, *((0,) * 15))
    fault(machine, b"\x0f\x11\x07")
    assert device.seen == [("w", 0x20, 8, 0x2222), ("w", 0x28, 8, 0x1111)]


@pytest.mark.parametrize("insn", [b"\x0f\x29\x07", b"\x66\x0f\xe7\x07", b"\x48\x0f\xc7\x0f", b"\x66\x0f\x38\xf8\x3e"])
def test_misaligned_operands_are_general_protection_faults(insn):
    machine, device = make()
    registers(machine, rdi=DEVICE + 8)
    outcome = fault(machine, insn, gpa=DEVICE + 8)
    assert outcome.first(Injected).event == event(Vector.GP, EventType.EXCEPTION, 0)
    assert device.seen == []


# Faults and limits -------------------------------------------------------------------------------------------------


def test_a_fault_of_the_other_operand_is_the_guests():
    machine, device = make()
    paging(machine, 9)
    regs = registers(machine, rsi=0x9010, rdi=0x8020)
    outcome = fault(machine, b"\xa4")
    assert outcome.first(Injected).event == event(Vector.PF, EventType.EXCEPTION, 0)
    assert (machine.vcpus[0].system.cr2, regs.rip, regs.rdi) == (0x9010, 0x1000, 0x8020)
    assert device.seen == []


def test_a_repeated_store_keeps_what_it_did_before_a_fault():
    machine, device = make()
    paging(machine, 9)
    regs = registers(machine, rdi=0x8FFE, rcx=4, rax=0x7)
    outcome = fault(machine, b"\xf3\xaa", gpa=DEVICE + 0xFFE)
    assert [entry[1] for entry in device.seen] == [0xFFE, 0xFFF]
    assert (regs.rcx, regs.rdi, regs.rip) == (2, 0x9000, 0x1000)
    assert outcome.first(Injected).event >> 32 == 2


def test_a_repeat_without_end_is_served_in_passes():
    machine, device = make()
    regs = registers(machine, rcx=(1 << 64) - 1, rax=0)
    fault(machine, b"\xf3\xaa")
    assert len(device.seen) == MAX_ELEMENTS
    assert (regs.rcx, regs.rip) == ((1 << 64) - 1 - MAX_ELEMENTS, 0x1000)


def test_memory_that_is_not_mapped_is_mapped_and_the_instruction_runs_again():
    machine, device = make()
    machine.apply(NptEdit(0, 0x8000, 0, 0x1000, MapFlag.UNMAP))
    assert fault(machine, b"\x89\x06", gpa=0x8000).first(Resumed).rip == 0x1000
    store(machine, 0x8000, b"ok")
    assert read(machine, 0x8000, 2) == b"ok"
    assert device.seen == []


def test_a_write_to_read_only_memory_is_dropped_like_one_to_rom():
    machine, _ = make()
    store(machine, 0x8000, b"rom!")
    spa = machine.hypervisor.vms[0].memory_spa + 0x8000
    machine.apply(NptEdit(0, 0x8000, spa, 0x1000, MapFlag.USER))
    regs = registers(machine, rax=0x41)
    fault(machine, b"\x88\x06", gpa=0x8000, error=WRITE | NpfError.P)
    assert read(machine, 0x8000, 4) == b"rom!"
    assert regs.rip == 0x1002


def test_nothing_at_an_address_reads_ones_and_drops_writes():
    machine, _ = make()
    regs = registers(machine, rdi=0xC000_0000)
    fault(machine, b"\x8b\x07", gpa=0xC000_0000, error=READ)
    assert regs.rax == 0xFFFF_FFFF
    assert fault(machine, b"\x89\x07", gpa=0xC000_0000).first(io.Unserved) is None


def test_an_emulated_instruction_ends_the_interrupt_shadow():
    machine, _ = make()
    machine.vcpus[0].vmcb.interrupt_state = 1
    fault(machine, b"\x89\x07")
    assert machine.vcpus[0].vmcb.interrupt_state == 0


def test_a_rip_relative_operand_follows_rip():
    machine, device = make()
    for rip in (DEVICE, DEVICE + 0x100):
        registers(machine, rip=rip)
        fault(machine, b"\x88\x05\x10\x00\x00\x00", gpa=rip + 0x16)
    assert [entry[1] for entry in device.seen] == [0x16, 0x116]


# The coverage matrix -----------------------------------------------------------------------------------------------

EXAMPLES = {
    Form.MOV: b"\x89\x07",
    Form.MOV_MOFFS: b"\x67\xa1\x20\x00\x00\xd0",
    Form.MOVX: b"\x0f\xb6\x07",
    Form.MOVSXD: b"\x48\x63\x07",
    Form.MOVBE: b"\x0f\x38\xf0\x07",
    Form.MOVNTI: b"\x0f\xc3\x07",
    Form.STOS_LODS: b"\xaa",
    Form.SCAS: b"\xae",
    Form.ALU: b"\x01\x07",
    Form.ALU_READ: b"\x3b\x07",
    Form.BIT: b"\x0f\xba\x2f\x03",
    Form.EXCHANGE: b"\x87\x07",
    Form.CMPXCHG: b"\x0f\xb1\x07",
    Form.CMPXCHG16B: b"\x48\x0f\xc7\x0f",
    Form.SHIFT: b"\xd1\x27",
    Form.SIMD: b"\x0f\x10\x07",
    Form.MOVS: b"\xa5",
    Form.STACK: b"\xff\x37",
    Form.MOVDIR64B: b"\x66\x0f\x38\xf8\x3e",
    Form.STRING_IO: b"\x6e",
    Form.OTHER: b"\x0f\xae\x07",
}


def test_every_form_has_an_example_of_its_own():
    assert set(EXAMPLES) == set(Form) == set(MATRIX)
    assert {form: form_of(io.decode(code, 64)) for form, code in EXAMPLES.items()} == {form: form for form in Form}


@pytest.mark.parametrize("form", Form, ids=lambda form: form.name)
@pytest.mark.parametrize("mode", [io.Mode.PLAIN, io.Mode.SEV])
def test_the_matrix_says_what_the_hypervisor_does(form, mode):
    machine, device = make(mode)
    gpa = DEVICE + 0x20
    if form is Form.MOVDIR64B:
        registers(machine, rdi=DEVICE + 0x40)
        gpa = DEVICE + 0x40
    elif form is Form.STRING_IO:
        registers(machine, rsi=DEVICE + 0x20)
    outcome = fault(machine, EXAMPLES[form], gpa=gpa)
    row = MATRIX[form]
    served = not (row.plain if mode is io.Mode.PLAIN else row.sev)
    assert (outcome.first(io.Unserved) is None) == served, outcome
    assert bool(device.seen) == served


def test_the_matrix_is_written_for_people():
    table = markdown_table()
    assert table.count("\n") == len(Form) + 1
    assert all(title in table for title in COLUMNS.values())
    assert "| MOV register or immediate, memory | yes | yes | yes | yes | yes | yes |" in table


def test_linuxs_handler_decodes_ten_opcodes():
    """Source: Linux arch/x86/lib/insn-eval.c, insn_decode_mmio."""
    served = {form for form, row in MATRIX.items() if not row.linux_vc}
    assert served == {Form.MOV, Form.MOVX, Form.MOVS, Form.STRING_IO}
