"""Event delivery in each mode: what is pushed, which stack, which faults combine; a failed delivery changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.config import GuestConfig
from sevlab.core.cpu import FaultUnwind
from sevlab.core.delivery import Delivered, deliver, read_descriptor, segment_of
from sevlab.core.events import MemoryWrite, Party, Space
from sevlab.core.state import capture
from sevlab.core.svm import EventType, ExitCode, Vector, event
from sevlab.core.testing import make_machine

PAGE_TABLES, GDT, IDT, TSS, STACK, USER_STACK, IST_STACK = 0x1000, 0x8000, 0x9000, 0xA000, 0x20000, 0x30000, 0x40000
CODE, DATA, USER_CODE, USER_DATA, CODE_32, TSS_SELECTOR = 0x08, 0x10, 0x1B, 0x23, 0x28, 0x40
HANDLER = 0x5000

DESCRIPTORS = {
    0x08: 0x00AF_9B00_0000_FFFF,  # 64-bit code, DPL 0
    0x10: 0x00CF_9300_0000_FFFF,  # data, DPL 0
    0x18: 0x00AF_FB00_0000_FFFF,  # 64-bit code, DPL 3
    0x20: 0x00CF_F300_0000_FFFF,  # data, DPL 3
    0x28: 0x00CF_9B00_0000_FFFF,  # 32-bit code, DPL 0
    0x30: 0x00AF_9F00_0000_FFFF,  # conforming 64-bit code, DPL 0
    0x38: 0x00AF_1B00_0000_FFFF,  # 64-bit code that is not present
    0x48: 0x0000_1100_0000_0000,  # data that is not present
    0x50: 0x00CF_9700_0000_0FFF,  # expand-down data: legal above 0xFFFFFF
}


def store(machine, address, data):
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, address, False, data))


def gate_64(offset, selector=CODE, kind=0xE, dpl=0, present=True, ist=0):
    low = offset & 0xFFFF | selector << 16 | ist << 32 | kind << 40 | dpl << 45 | present << 47
    return (low | (offset >> 16 & 0xFFFF) << 48 | offset >> 32 << 64).to_bytes(16, "little")


def gate_32(offset, selector=CODE_32, kind=0xE, dpl=0, present=True):
    word = offset & 0xFFFF | selector << 16 | kind << 40 | dpl << 45 | present << 47 | (offset >> 16) << 48
    return word.to_bytes(8, "little")


def machine_in(mode, **settings):
    machine = make_machine(guests=(GuestConfig(memory_bytes=4 << 20),), **settings)
    vcpu = machine.vcpus[0]
    for selector, descriptor in DESCRIPTORS.items():
        store(machine, GDT + selector, descriptor.to_bytes(8, "little"))
    system = vcpu.system
    system.gdtr = (0, 0, 0x5F, GDT)
    system.idtr = (0, 0, 0xFFF, IDT)
    system.tr = (TSS_SELECTOR, 0x8B, 0x67, TSS)
    vcpu.regs.rsp, vcpu.regs.rip, vcpu.regs.rflags = STACK, 0x4000, 0x302
    if mode == "long":
        tables = ((0x1000, 0x2000), (0x2000, 0x3000))
        for place, target in tables:
            store(machine, place, (target | 7).to_bytes(8, "little"))
        for index in range(2):
            store(machine, 0x3000 + 8 * index, (index << 21 | 0xE7).to_bytes(8, "little"))
        system.cr0, system.cr3, system.cr4, system.efer = 0x8001_0011, PAGE_TABLES, 0x20, 0x1D01
        system.cs, system.ss = segment_of(CODE, DESCRIPTORS[8]), segment_of(DATA, DESCRIPTORS[0x10])
        store(machine, TSS, b"\0" * 4 + STACK.to_bytes(8, "little") + b"\0" * 24 + IST_STACK.to_bytes(8, "little"))
        for vector in range(256):
            store(machine, IDT + vector * 16, gate_64(HANDLER + vector))
    elif mode == "protected":
        system.cr0 = 0x11
        system.cs, system.ss = segment_of(CODE_32, DESCRIPTORS[0x28]), segment_of(DATA, DESCRIPTORS[0x10])
        store(machine, TSS, b"\0" * 4 + STACK.to_bytes(4, "little") + DATA.to_bytes(4, "little"))
        for vector in range(256):
            store(machine, IDT + vector * 8, gate_32(HANDLER + vector))
    else:
        system.cr0 = 0x10
        system.idtr, system.cs = (0, 0, 0x3FF, 0), (0x400, 0x9B, 0xFFFF, 0x4000)
        for vector in range(256):
            store(machine, vector * 4, (0x10 + vector | 0x500 << 16).to_bytes(4, "little"))
        vcpu.regs.rsp, vcpu.regs.rip = 0xFFF0, 0x12
    machine.mark()
    return machine


@pytest.fixture(scope="module")
def long_machine():
    return machine_in("long")


@pytest.fixture
def long(long_machine):
    long_machine.reset()
    return long_machine


@pytest.fixture
def protected():
    return machine_in("protected")


def words(machine, count, width=8):
    vcpu = machine.vcpus[0]
    raw = machine.access.guest_read(vcpu, vcpu.system.ss[3] + vcpu.regs.rsp, count * width)
    return [int.from_bytes(raw[start : start + width], "little") for start in range(0, len(raw), width)]


def to_user(machine):
    system = machine.vcpus[0].system
    system.cpl = 3
    system.cs, system.ss = segment_of(USER_CODE, DESCRIPTORS[0x18]), segment_of(USER_DATA, DESCRIPTORS[0x20])
    machine.vcpus[0].regs.rsp = USER_STACK


def interrupt(vector):
    return event(vector, EventType.INTERRUPT)


def exception(vector, error_code=None):
    return event(vector, EventType.EXCEPTION, error_code)


def test_a_long_mode_frame_holds_ss_rsp_rflags_cs_rip_and_the_error_code(long):
    vcpu = long.vcpus[0]
    vcpu.regs.rsp = STACK - 3
    assert deliver(long, vcpu, exception(Vector.GP, 0x18)) is Delivered.DELIVERED
    assert vcpu.regs.rip == HANDLER + Vector.GP
    assert vcpu.regs.rsp == (STACK - 3 & -16) - 48  # aligned first
    rf = 1 << 16  # a fault restarts its instruction with RF
    assert words(long, 6) == [0x18, 0x4000, CODE, 0x302 | rf, STACK - 3, DATA]


def test_an_interrupt_gate_clears_if_and_a_trap_gate_keeps_it(long):
    vcpu = long.vcpus[0]
    deliver(long, vcpu, interrupt(0x30))
    assert vcpu.regs.rflags == 0x2
    assert words(long, 3)[2] == 0x302  # as it was, without RF
    long.reset()
    store(long, IDT + 0x30 * 16, gate_64(HANDLER, kind=0xF))
    deliver(long, long.vcpus[0], interrupt(0x30))
    assert long.vcpus[0].regs.rflags == 0x202


def test_from_user_mode_the_stack_comes_from_the_tss_and_ss_becomes_null(long):
    to_user(long)
    vcpu = long.vcpus[0]
    deliver(long, vcpu, interrupt(0x30))
    assert vcpu.regs.rsp == STACK - 40
    assert (vcpu.system.cpl, vcpu.system.cs[0], vcpu.system.ss[0]) == (0, CODE, 0)
    assert words(long, 5) == [0x4000, USER_CODE, 0x302, USER_STACK, USER_DATA]


def test_an_ist_gate_switches_stacks_at_any_level(long):
    store(long, IDT + Vector.VC * 16, gate_64(HANDLER, ist=1))
    deliver(long, long.vcpus[0], exception(Vector.VC, 0x72))
    assert long.vcpus[0].regs.rsp == IST_STACK - 48
    assert long.vcpus[0].system.ss[0] == DATA  # no change of level: SS stays


def test_a_conforming_handler_keeps_the_level_of_the_interrupted_code(long):
    to_user(long)
    store(long, IDT + 0x30 * 16, gate_64(HANDLER, selector=0x30))
    deliver(long, long.vcpus[0], interrupt(0x30))
    assert (long.vcpus[0].system.cpl, long.vcpus[0].system.cs[0] & 3) == (3, 3)
    assert long.vcpus[0].regs.rsp == USER_STACK - 40


def test_software_interrupts_push_the_next_rip_and_respect_the_gates_dpl(long):
    to_user(long)
    word = event(0x80, EventType.SOFTWARE)
    deliver(long, long.vcpus[0], word, next_rip=0x4002)
    assert (long.vcpus[0].regs.rip, words(long, 2)) == (HANDLER + Vector.GP, [0x80 << 3 | 2, 0x4000])  # DPL 0 gate
    long.reset()
    to_user(long)
    store(long, IDT + 0x80 * 16, gate_64(HANDLER, dpl=3))
    deliver(long, long.vcpus[0], word, next_rip=0x4002)
    assert (long.vcpus[0].regs.rip, words(long, 1)) == (HANDLER, [0x4002])


@pytest.mark.parametrize(
    ("gate", "vector", "error"),
    [
        (gate_64(HANDLER, kind=0xC), Vector.GP, 0x30 << 3 | 3),
        (gate_64(HANDLER, kind=0x6), Vector.GP, 0x30 << 3 | 3),
        (gate_64(HANDLER, kind=0x1E), Vector.GP, 0x30 << 3 | 3),
        (gate_64(HANDLER, present=False), Vector.NP, 0x30 << 3 | 3),
        (gate_64(HANDLER, selector=0), Vector.GP, 1),
        (gate_64(HANDLER, selector=3), Vector.GP, 1),
        (gate_64(HANDLER, selector=DATA), Vector.GP, DATA | 1),
        (gate_64(HANDLER, selector=CODE_32), Vector.GP, CODE_32 | 1),
        (gate_64(HANDLER, selector=USER_CODE), Vector.GP, 0x18 | 1),
        (gate_64(HANDLER, selector=0x38), Vector.NP, 0x38 | 1),
        (gate_64(HANDLER, selector=0x60), Vector.GP, 0x60 | 1),
        (gate_64(1 << 47), Vector.GP, 0),
    ],
    ids=[
        "call gate",
        "16-bit gate",
        "S bit",
        "gate not present",
        "null selector",
        "null selector with RPL",
        "data segment",
        "32-bit code",
        "less privileged code",
        "code not present",
        "past the GDT",
        "non-canonical handler",
    ],
)
def test_a_bad_gate_delivers_its_fault_instead(long, gate, vector, error):
    store(long, IDT + 0x30 * 16, gate)
    vcpu = long.vcpus[0]
    assert deliver(long, vcpu, interrupt(0x30)) is Delivered.DELIVERED
    assert (vcpu.regs.rip, words(long, 2)) == (HANDLER + vector, [error, 0x4000])


@pytest.mark.parametrize(("limit", "handled"), [(0x30F, 0x30), (0x30E, Vector.GP)])
def test_the_idt_ends_at_its_limit(long, limit, handled):
    vcpu = long.vcpus[0]
    vcpu.system.idtr = (0, 0, limit, IDT)
    deliver(long, vcpu, interrupt(0x30))
    assert vcpu.regs.rip == HANDLER + handled


@pytest.mark.parametrize(("limit", "handled"), [(11, 0x30), (10, Vector.TS)])
def test_the_tss_ends_at_its_limit(long, limit, handled):
    to_user(long)
    vcpu = long.vcpus[0]
    vcpu.system.tr = (TSS_SELECTOR, 0x8B, limit, TSS)
    if handled == Vector.TS:
        store(long, IDT + Vector.TS * 16, gate_64(HANDLER + Vector.TS, selector=0x30))  # needs no TSS
    deliver(long, vcpu, interrupt(0x30))
    assert vcpu.regs.rip == HANDLER + handled
    if handled == Vector.TS:
        assert words(long, 1) == [TSS_SELECTOR | 1]


def test_a_contributory_fault_on_the_way_of_another_is_a_double_fault(long):
    store(long, IDT + Vector.GP * 16, gate_64(HANDLER, present=False))
    vcpu = long.vcpus[0]
    assert deliver(long, vcpu, exception(Vector.GP, 0)) is Delivered.DELIVERED
    assert (vcpu.regs.rip, words(long, 2)) == (HANDLER + Vector.DF, [0, 0x4000])


def test_a_page_fault_on_the_way_of_an_interrupt_is_delivered_itself(long):
    store(long, IDT + 0x30 * 16, gate_64(HANDLER, ist=1))
    store(long, TSS + 36, (0x80_0000).to_bytes(8, "little"))  # not mapped
    vcpu = long.vcpus[0]
    assert deliver(long, vcpu, interrupt(0x30)) is Delivered.DELIVERED
    assert (vcpu.regs.rip, words(long, 2)) == (HANDLER + Vector.PF, [2, 0x4000])
    assert vcpu.system.cr2 == 0x80_0000 - 40


def test_a_fault_in_the_delivery_of_a_double_fault_shuts_down_and_changes_nothing_but_cr2(long):
    vcpu = long.vcpus[0]
    vcpu.system.idtr = (0, 0, 0, IDT)
    before = capture(vcpu)
    assert deliver(long, vcpu, exception(Vector.GP, 0)) is Delivered.SHUTDOWN
    assert capture(vcpu) == before


def test_a_non_canonical_stack_is_a_stack_fault(long):
    vcpu = long.vcpus[0]
    vcpu.regs.rsp = 1 << 47 | 0x20
    store(long, IDT + Vector.SS * 16, gate_64(HANDLER, ist=1))
    deliver(long, vcpu, interrupt(0x30))
    assert (vcpu.regs.rip, words(long, 2)) == (HANDLER, [0, 0x4000])


def test_a_nested_page_fault_on_the_way_names_the_event_and_changes_nothing(long):
    vcpu = long.vcpus[0]
    vm = long.hypervisor.vms[0]
    store(long, 0x3000 + 8 * 2, (2 << 21 | 0xE7).to_bytes(8, "little"))  # mapped by the guest
    long.access.nested_tables(vm).unmap(0x20_0000, 1 << 21)
    long.access.forget()
    vcpu.regs.rsp = 0x21_0000
    before = capture(vcpu.regs)
    with pytest.raises(FaultUnwind) as raised:
        deliver(long, vcpu, interrupt(0x30))
    assert raised.value.fault.vector == ExitCode.NPF
    assert vcpu.vmcb.exit_int_info == interrupt(0x30)
    assert capture(vcpu.regs) == before


def test_delivery_ends_the_interrupt_shadow_and_a_halt(long):
    vcpu = long.vcpus[0]
    vcpu.vmcb.interrupt_state, vcpu.halted = 3, True
    deliver(long, vcpu, interrupt(0x30))
    assert (vcpu.vmcb.interrupt_state, vcpu.halted) == (2, False)


@given(
    word=st.integers(0, (1 << 64) - 1).map(lambda number: number & ~0x7800 | 1 << 31),
    gate=st.binary(min_size=16, max_size=16),
    rsp=st.one_of(st.integers(0, 1 << 22), st.integers(0, (1 << 64) - 1)),
    user=st.booleans(),
)
def test_any_event_through_any_gate_ends_in_one_of_the_outcomes(long_machine, word, gate, rsp, user):
    machine = long_machine
    machine.reset()
    if user:
        to_user(machine)
    vcpu = machine.vcpus[0]
    vcpu.regs.rsp = rsp
    store(machine, IDT + (word & 0xFF) * 16, gate)
    before = capture(vcpu.regs)
    how, fault = None, None
    try:
        how = deliver(machine, vcpu, word)
    except FaultUnwind as unwind:
        fault = unwind.fault
    assert (how is None) == (fault is not None and fault.vector == ExitCode.NPF)
    assert (how is Delivered.DELIVERED) == (capture(vcpu.regs) != before)


def test_a_protected_mode_frame_has_32_bit_words_and_no_stack_without_a_change_of_level(protected):
    vcpu = protected.vcpus[0]
    deliver(protected, vcpu, exception(Vector.VC, 0x72))
    assert vcpu.regs.rsp == STACK - 16
    assert words(protected, 4, 4) == [0x72, 0x4000, CODE_32, 0x302 | 1 << 16]
    assert vcpu.regs.rip == HANDLER + Vector.VC


def test_protected_mode_takes_ss_and_esp_of_the_inner_level_from_the_tss(protected):
    vcpu = protected.vcpus[0]
    vcpu.system.cpl = 3
    vcpu.system.ss = segment_of(USER_DATA, DESCRIPTORS[0x20])
    vcpu.regs.rsp = USER_STACK
    deliver(protected, vcpu, interrupt(0x30))
    assert (vcpu.system.ss[0], vcpu.regs.rsp) == (DATA, STACK - 20)
    assert words(protected, 5, 4) == [0x4000, CODE_32, 0x302, USER_STACK, USER_DATA]


@pytest.mark.parametrize(
    ("selector", "vector", "error"),
    [
        (0, Vector.TS, 1),
        (0x48, Vector.TS, 0x49),
        (0x08, Vector.TS, 0x09),
        (0x13, Vector.TS, 0x11),
        (0x60, Vector.TS, 0x61),
    ],
    ids=["null", "read only", "code", "wrong RPL", "past the GDT"],
)
def test_a_bad_inner_stack_is_an_invalid_tss(protected, selector, vector, error):
    vcpu = protected.vcpus[0]
    vcpu.system.cpl = 3
    store(protected, TSS + 8, selector.to_bytes(4, "little"))
    store(protected, GDT + 0x50, (0x00CF_9F00_0000_FFFF).to_bytes(8, "little"))  # conforming 32-bit code
    store(protected, IDT + vector * 8, gate_32(HANDLER, selector=0x50))  # its handler needs no TSS
    deliver(protected, vcpu, interrupt(0x30))
    assert (vcpu.regs.rip, words(protected, 1, 4)) == (HANDLER, [error])


@pytest.mark.parametrize(("esp", "how"), [(0x100C, Delivered.DELIVERED), (0x100B, Delivered.SHUTDOWN)])
def test_an_expand_down_stack_begins_above_its_limit(protected, esp, how):
    vcpu = protected.vcpus[0]
    vcpu.system.ss = segment_of(0x50, DESCRIPTORS[0x50])
    vcpu.system.ss = (0x50, vcpu.system.ss[1] & ~0x800, 0xFFF, 0)
    vcpu.regs.rsp = esp
    assert deliver(protected, vcpu, interrupt(0x30)) is how  # #SS and #DF find no stack either


def test_16_bit_gates_push_16_bit_words(protected):
    store(protected, IDT + 0x30 * 8, gate_32(0x7_5000, kind=0x6))
    vcpu = protected.vcpus[0]
    deliver(protected, vcpu, interrupt(0x30))
    assert vcpu.regs.rip == 0x5000
    assert words(protected, 3, 2) == [0x4000, CODE_32, 0x302]


def test_a_task_gate_and_virtual_8086_mode_are_named_not_guessed(protected):
    vcpu = protected.vcpus[0]
    store(protected, IDT + 0x30 * 8, gate_32(0, kind=0x5))
    assert deliver(protected, vcpu, interrupt(0x30)) is Delivered.TASK_GATE
    vcpu.regs.rflags |= 1 << 17
    assert deliver(protected, vcpu, interrupt(0x30)) is Delivered.VIRTUAL_8086


def test_real_mode_goes_through_the_vector_table_without_an_error_code():
    machine = machine_in("real")
    vcpu = machine.vcpus[0]
    deliver(machine, vcpu, exception(Vector.GP, 0))
    assert (vcpu.system.cs[0], vcpu.system.cs[3], vcpu.regs.rip) == (0x500, 0x5000, 0x10 + Vector.GP)
    assert words(machine, 3, 2) == [0x12, 0x400, 0x302]
    assert vcpu.regs.rflags == 0x2


def test_descriptors_are_read_up_to_the_limit_of_their_table(protected):
    vcpu = protected.vcpus[0]
    found = read_descriptor(protected, vcpu, 0x58)
    assert found is not None
    assert found[1] == GDT + 0x58
    assert read_descriptor(protected, vcpu, 0x60) is None
    vcpu.system.ldtr = (0, 0x82, 7, GDT + 8)
    assert read_descriptor(protected, vcpu, 0x04) == (DESCRIPTORS[8], GDT + 8)
    assert read_descriptor(protected, vcpu, 0x0C) is None
