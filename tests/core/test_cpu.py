from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.cpu import (
    Vcpu,
    Vmcb,
    VmcbControl,
    illegal_state,
    msr_permission_bit,
    skip_instruction,
    visible_registers,
)
from sevlab.core.errors import InvariantViolation
from sevlab.core.events import (
    CpuExit,
    Data,
    Done,
    Faulted,
    Injected,
    MapFlag,
    MemoryRead,
    MemoryWrite,
    NotIntercepted,
    NptEdit,
    Party,
    Refused,
    Resumed,
    Schedule,
    SetRegisters,
    Space,
    Stopped,
    Unhandled,
    VmcbWrite,
    VmExit,
)
from sevlab.core.svm import EVENT_VALID, EventType, ExitCode, NpfError, Vector, event, exit_name
from sevlab.core.testing import assert_changes_nothing, make_machine


@pytest.fixture
def machine():
    return make_machine(guests=1)


def do(machine, code, info1=0):
    return machine.apply(CpuExit(0, code, info1, 0, b"\x0f\xa2", 0))


@given(st.binary(min_size=1024, max_size=1024))
def test_a_vmcb_takes_any_bytes_and_gives_back_what_it_knows(data):
    vmcb = Vmcb()
    vmcb.load_bytes(data)
    again = Vmcb()
    again.load_bytes(vmcb.to_bytes())
    assert repr(again) == repr(vmcb)
    assert vmcb.exit_code == int.from_bytes(data[0x70:0x78], "little")
    assert VmcbControl.from_bytes(vmcb.to_bytes()).guest_asid == vmcb.guest_asid


def test_what_the_vmcb_does_not_intercept_is_the_guests_own(machine):
    assert do(machine, ExitCode.CPUID).records == (NotIntercepted(0, ExitCode.CPUID),)


def test_an_exit_without_a_handler_stops_the_vm_and_says_so(machine):
    machine.vcpus[0].vmcb.intercept(ExitCode.CPUID)
    outcome = do(machine, ExitCode.CPUID)
    assert outcome.first(VmExit) == VmExit(0, ExitCode.CPUID, 0, 0)
    assert outcome.first(Unhandled) == Unhandled(0, ExitCode.CPUID)
    assert outcome.first(Stopped) == Stopped(0, "no handler for exit CPUID")
    assert do(machine, ExitCode.CPUID).first(Refused) == Refused("vCPU 0 has stopped")


@pytest.mark.parametrize("code", [ExitCode.NPF, ExitCode.VMGEXIT, ExitCode.INVALID])
def test_some_exits_have_no_intercept_bit(machine, code):
    assert do(machine, code).first(VmExit) is not None


def iopm(machine, port, value):
    machine.memory.write(machine.vcpus[0].vmcb.iopm_base_pa + (port >> 3), bytes([value]), None, 1)


@pytest.mark.parametrize(
    ("width", "port", "clear", "exits"),
    [(1, 0x60, 0x60, False), (1, 0x60, 0x61, True), (2, 0x5F, 0x60, True), (4, 0x5C, 0x5B, True)],
)
def test_a_port_exits_when_any_of_its_bytes_is_in_the_map(machine, width, port, clear, exits):
    machine.vcpus[0].vmcb.intercept(ExitCode.IOIO)
    iopm(machine, clear, 0xFF & ~(1 << (clear & 7)))
    outcome = do(machine, ExitCode.IOIO, port << 16 | width << 4)
    assert (outcome.first(VmExit) is not None) == exits


def test_a_wide_port_access_does_not_exit_when_all_its_bits_are_clear(machine):
    machine.vcpus[0].vmcb.intercept(ExitCode.IOIO)
    iopm(machine, 0x58, 0x0F)
    iopm(machine, 0x60, 0xFF)
    assert do(machine, ExitCode.IOIO, 0x5C << 16 | 4 << 4).first(VmExit) is None
    assert do(machine, ExitCode.IOIO, 0x5D << 16 | 4 << 4).first(VmExit) is not None


@pytest.mark.parametrize(
    ("msr", "bit"),
    [
        (0, 0),
        (0x1FFF, 0x3FFE),
        (0x2000, None),
        (0xC000_0000, 0x4000),
        (0xC000_1FFF, 0x7FFE),
        (0xC001_0010, 0x8020),
        (0xC001_2000, None),
    ],
)
def test_msr_permission_bits(msr, bit):
    assert msr_permission_bit(msr) == bit


def test_rdmsr_and_wrmsr_have_a_bit_each(machine):
    vcpu = machine.vcpus[0]
    vcpu.vmcb.intercept(ExitCode.MSR)
    vcpu.regs.rcx = 0xC001_0010
    place = vcpu.vmcb.msrpm_base_pa + (0x8020 >> 3)
    machine.memory.write(place, b"\xfe", None, 1)
    assert do(machine, ExitCode.MSR, 0).first(VmExit) is None
    assert do(machine, ExitCode.MSR, 1).first(VmExit) is not None


def test_an_msr_outside_the_map_always_exits(machine):
    vcpu = machine.vcpus[0]
    vcpu.vmcb.intercept(ExitCode.MSR)
    vcpu.regs.rcx = 0x4000_0000
    machine.memory.write(vcpu.vmcb.msrpm_base_pa, bytes(8192), None, 1)
    assert do(machine, ExitCode.MSR).first(VmExit) is not None


def valid_vcpu():
    vcpu = Vcpu()
    vcpu.vmcb.guest_asid = 1
    vcpu.vmcb.intercept(ExitCode.VMRUN)
    return vcpu


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda v: None, ""),
        (lambda v: setattr(v.vmcb, "guest_asid", 0), "the ASID is 0"),
        (lambda v: setattr(v.vmcb, "intercepts", 0), "VMRUN is not intercepted"),
        (lambda v: setattr(v.system, "efer", 0), "EFER.SVME"),
        (lambda v: setattr(v.system, "cr0", 0x2000_0010), "CR0.NW is 1"),
        (lambda v: setattr(v.system, "cr0", 1 << 32), "CR0[63:32]"),
        (lambda v: setattr(v.system, "dr7", 1 << 32 | 0x400), "DR6[63:32] or DR7"),
        (lambda v: (setattr(v.system, "efer", 0x1100), setattr(v.system, "cr0", 0x8000_0011)), "CR4.PAE is 0"),
        (
            lambda v: (
                setattr(v.system, "efer", 0x1100),
                setattr(v.system, "cr0", 0x8000_0010),
                setattr(v.system, "cr4", 0x20),
            ),
            "CR0.PE is 0",
        ),
        (
            lambda v: (
                setattr(v.system, "efer", 0x1100),
                setattr(v.system, "cr0", 0x8000_0011),
                setattr(v.system, "cr4", 0x20),
                setattr(v.system, "cs", (8, 0x69B, 0xFFFF, 0)),
            ),
            "CS has both L and D",
        ),
        (lambda v: setattr(v.vmcb, "event_inj", EVENT_VALID | 1 << 8), "reserved type"),
        (lambda v: setattr(v.vmcb, "event_inj", EVENT_VALID | 3 << 8 | 2), "a vector that is none"),
        (lambda v: setattr(v.vmcb, "event_inj", EVENT_VALID | 3 << 8 | 32), "a vector that is none"),
        (lambda v: setattr(v.vmcb, "event_inj", EVENT_VALID | 3 << 8 | 31), ""),
        (lambda v: setattr(v.vmcb, "event_inj", 1 << 8), ""),
    ],
)
def test_vmrun_refuses_illegal_states(change, why):
    vcpu = valid_vcpu()
    change(vcpu)
    found = illegal_state(vcpu)
    assert why in found if why else found == ""


def test_a_refused_vmrun_is_an_invalid_exit_and_stops_the_vm(machine):
    machine.apply(VmcbWrite(0, 0x58, bytes(4)))
    outcome = machine.apply(Schedule())
    assert outcome.first(VmExit).exit_code == ExitCode.INVALID
    assert outcome.first(Resumed) is None
    assert outcome.first(Stopped).reason == "VMRUN failed with INVALID"


def test_an_injected_event_is_delivered_once(machine):
    word = event(Vector.GP, EventType.EXCEPTION, 0x10)
    assert word == 0x10 << 32 | 0x8000_0B0D
    machine.apply(VmcbWrite(0, 0xA8, word.to_bytes(8, "little")))
    assert machine.apply(Schedule()).first(Injected) == Injected(0, word)
    assert machine.apply(Schedule()).first(Injected) is None


def test_the_hypervisor_cannot_read_encrypted_registers(machine):
    vcpu = machine.vcpus[0]
    assert visible_registers(machine, vcpu) is vcpu.regs
    vcpu.vmcb.encryption_control |= 4
    with pytest.raises(InvariantViolation, match=r"cpu\.encrypted-state"):
        visible_registers(machine, vcpu)


def test_skipping_uses_nrip_or_the_length():
    vcpu = Vcpu()
    vcpu.regs.rip = 0xFFFF_FFFF_FFFF_FFFF
    skip_instruction(vcpu, CpuExit(0, 0, 0, 0, b"\x0f\xa2", 0))
    assert vcpu.regs.rip == 1
    skip_instruction(vcpu, CpuExit(0, 0, 0, 0, b"\x0f\xa2", 0x77))
    assert vcpu.regs.rip == 0x77


def test_exit_names_cover_the_ranges():
    assert [exit_name(code) for code in (0x03, 0x14, 0x27, 0x4E, 0x94, 0x400, 0x999)] == [
        "CR3_READ",
        "CR4_WRITE",
        "DR7_READ",
        "EXCEPTION_14",
        "CR4_WRITE_TRAP",
        "NPF",
        "0x999",
    ]


# The guest's memory, through both walks --------------------------------------------------------------------------


def guest_read(address, length=4, *, space=Space.GPA, c_bit=False):
    return MemoryRead(Party.GUEST, 0, space, address, c_bit, length)


def test_guest_physical_memory_is_the_share_of_the_vm(machine):
    vm = machine.hypervisor.vms[0]
    machine.memory.write(vm.memory_spa + 0x5000, b"abcd", None, 1)
    assert machine.apply(guest_read(0x5000)).first(Data) == Data(b"abcd")
    assert machine.apply(guest_read(0x5000, space=Space.GVA)).first(Data) == Data(b"abcd")


def test_an_unmapped_page_is_a_nested_fault_that_exits(machine):
    machine.apply(NptEdit(0, 0x5000, 0, 4096, MapFlag.UNMAP))
    exit_ = machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, 0x5008, False, b"x")).first(VmExit)
    assert exit_ == VmExit(0, ExitCode.NPF, NpfError.W | NpfError.U | NpfError.FINAL, 0x5008)


def test_a_write_over_two_pages_changes_nothing_when_the_second_faults(machine):
    machine.apply(NptEdit(0, 0x6000, 0, 4096, MapFlag.UNMAP))
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, 0x5FFE, False, b"abcd"))
    machine.reset()
    assert machine.apply(guest_read(0x5FFE, 2)).first(Data) == Data(b"\0\0")


def test_a_remapped_page_shows_other_memory(machine):
    vm = machine.hypervisor.vms[0]
    machine.memory.write(vm.memory_spa + 0x7000, b"else", None, 1)
    machine.apply(guest_read(0x5000))
    flags = MapFlag.WRITABLE | MapFlag.USER
    assert machine.apply(NptEdit(0, 0x5000, vm.memory_spa + 0x7000, 4096, flags)).first(Done) is not None
    assert machine.apply(guest_read(0x5000)).first(Data) == Data(b"else")


@pytest.mark.parametrize(
    "edit",
    [
        NptEdit(7, 0, 0, 4096, 0),
        NptEdit(0, 0x800, 0, 4096, 0),
        NptEdit(0, 0, 0x1000, 1 << 21, 0),
        NptEdit(0, 0, 0, 8192, 0),
        NptEdit(0, 1 << 48, 0, 4096, 0),
    ],
)
def test_an_impossible_mapping_is_refused_and_changes_nothing(machine, edit):
    assert assert_changes_nothing(machine, edit).first(Refused) is not None


def long_mode(machine, entries):
    """Four levels of tables at guest-physical 0x10000, one page each; `entries` are the leaf entries."""
    for level in range(3):
        entry = 0x11000 + level * 0x1000 | 0x27
        machine.access.guest_physical_write(
            machine.vcpus[0], 0x10000 + level * 0x1000, entry.to_bytes(8, "little"), c_bit=False
        )
    for index, entry in entries.items():
        machine.access.guest_physical_write(
            machine.vcpus[0], 0x13000 + index * 8, entry.to_bytes(8, "little"), c_bit=False
        )
    values = (("cr0", 0x8001_0011), ("cr3", 0x10000), ("cr4", 0x20), ("efer", 0x1D00))
    machine.apply(SetRegisters(0, values))


def test_linear_addresses_go_through_the_guests_tables(machine):
    long_mode(machine, {5: 0x6000 | 0x67})
    machine.access.guest_physical_write(machine.vcpus[0], 0x6010, b"mapped", c_bit=False)
    assert machine.apply(guest_read(0x5010, 6, space=Space.GVA)).first(Data) == Data(b"mapped")
    fault = machine.apply(guest_read(0x9000, space=Space.GVA)).first(Faulted)
    assert fault == Faulted(Vector.PF, 0, 0x9000)
    fault = machine.apply(guest_read(1 << 63, space=Space.GVA)).first(Faulted)
    assert fault == Faulted(Vector.GP, 0, 0)


def test_the_walk_sets_accessed_and_dirty_bits(machine):
    long_mode(machine, {5: 0x6000 | 7})
    machine.apply(guest_read(0x5000, space=Space.GVA))
    leaf = machine.access.guest_physical_read(machine.vcpus[0], 0x13028, 8, c_bit=False)
    assert leaf[0] == 0x27
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GVA, 0x5000, False, b"x"))
    leaf = machine.access.guest_physical_read(machine.vcpus[0], 0x13028, 8, c_bit=False)
    assert leaf[0] == 0x67


def test_a_fault_in_the_table_walk_says_so(machine):
    long_mode(machine, {5: 0x6000 | 0x67})
    machine.apply(NptEdit(0, 0x12000, 0, 4096, MapFlag.UNMAP))
    exit_ = machine.apply(guest_read(0x5000, space=Space.GVA)).first(VmExit)
    assert exit_.exit_info_1 == NpfError.U | NpfError.TABLE_WALK
    assert exit_.exit_info_2 == 0x12000


def test_user_code_is_held_to_user_pages(machine):
    long_mode(machine, {5: 0x6000 | 0x63})
    machine.apply(SetRegisters(0, (("cpl", 3),)))
    assert machine.apply(guest_read(0x5000, space=Space.GVA)).first(Faulted) == Faulted(Vector.PF, 5, 0x5000)
