"""CPUID leaves, the hypercall page, and why an encrypted guest cannot execute one that Xen wrote."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from sevlab.core.events import CpuExit, Injected
from sevlab.core.svm import EventType, ExitCode, Vector, event
from sevlab.plugins.xen import Abi, XenGuest, hypercall_page, xen
from sevlab.plugins.xen.layout import SharedInfo32

from tests.plugins.xen.world import BOUNCE, guest_of, machine_of, registers_of

RTC_EPOCH = datetime(2025, 1, 1, tzinfo=UTC)
"""The date of every machine's clock when it starts."""


def cpuid(machine, leaf, subleaf=0, vcpu=0):
    regs = registers_of(machine, vcpu, rax=leaf, rcx=subleaf)
    machine.apply(CpuExit(vcpu, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0))
    return regs.rax, regs.rbx, regs.rcx, regs.rdx


def find_xen(machine):
    """As Linux does: every 0x100 up to 0x40010000."""
    for base in range(0x4000_0000, 0x4001_0000, 0x100):
        eax, *text = cpuid(machine, base)
        if b"".join(word.to_bytes(4, "little") for word in text) == b"XenVMMXenVMM" and eax - base >= 2:
            return base
    return None


@pytest.mark.parametrize(
    ("viridian", "base", "msr"), [(False, 0x4000_0000, 0x4000_0000), (True, 0x4000_0100, 0x4000_0200)]
)
def test_a_guest_finds_xen_with_and_without_hyperv_leaves(viridian, base, msr):
    machine = machine_of(viridian=viridian)
    assert find_xen(machine) == base
    assert cpuid(machine, base)[0] == base + 5
    assert cpuid(machine, base + 1) == (4 << 16 | 17, 0, 0, 0)
    assert cpuid(machine, base + 2) == (1, msr, 0, 0)
    assert cpuid(machine, base + 4, 0, vcpu=1) == (1 << 2 | 1 << 3 | 1 << 4 | 1 << 6, 0, 2, 0)
    assert cpuid(machine, base + 4, 1) == (0, 0, 0, 0)
    assert cpuid(machine, base + 5) == (0, 0, 0, 0)
    assert cpuid(machine, base + 6) == (0, 0, 0, 0)
    if viridian:
        assert cpuid(machine, 0x4000_0000)[1:] == (0x7263694D, 0x666F736F, 0x76482074)
        assert cpuid(machine, 0x4000_0001)[0] == 0x31237648


def test_the_time_leaf_says_the_frequency():
    machine = machine_of()
    flags, mode, khz, incarnation = cpuid(machine, 0x4000_0003)
    assert (flags & 1, mode, khz, incarnation) == (0, 2, 2_000_000, 0)
    _, _, multiplier, shift = cpuid(machine, 0x4000_0003, 1)
    signed_shift = shift - 256 if shift > 127 else shift
    tsc = 2_000_000_000
    scaled = tsc << signed_shift if signed_shift >= 0 else tsc >> -signed_shift
    assert abs((scaled * multiplier >> 32) - 1_000_000_000) < 10
    assert cpuid(machine, 0x4000_0003, 2) == (2_000_000, 0, 0, 0)


@pytest.mark.parametrize(("abi", "bit"), [("none", 0), ("physical", 1 << 7), ("fast", 1 << 7)])
def test_bit_7_of_leaf_4_says_that_there_is_another_abi(abi, bit):
    assert cpuid(machine_of(abi=abi), 0x4000_0004)[0] & 1 << 7 == bit


@pytest.mark.parametrize("viridian", [False, True])
@pytest.mark.parametrize(("abi", "found"), [("none", "legacy"), ("physical", "physical"), ("fast", "fast")])
def test_a_call_without_memory_tells_which_abi_bit_7_means(abi, found, viridian):
    machine = machine_of(abi=abi, viridian=viridian)
    guest = guest_of(machine, abi=Abi(found))
    assert guest.offered_abi() is Abi(found)


def wrmsr(machine, msr, value, vcpu=0):
    registers_of(machine, vcpu, rcx=msr, rax=value & 0xFFFF_FFFF, rdx=value >> 32)
    return machine.apply(CpuExit(vcpu, ExitCode.MSR, 1, 0, b"\x0f\x30", 0))


def test_the_hypercall_page_has_a_stub_for_each_number():
    page = hypercall_page()
    assert page[17 * 32 : 17 * 32 + 9] == bytes.fromhex("b8110000000f01d9c3")
    assert page[17 * 32 + 9 : 18 * 32] == b"\xcc" * 23
    assert page[23 * 32 : 23 * 32 + 2] == b"\x0f\x0b"
    assert page[127 * 32 : 127 * 32 + 5] == bytes.fromhex("b87f000000")
    assert hypercall_page("Intel")[17 * 32 : 17 * 32 + 9] == bytes.fromhex("b8110000000f01c1c3")
    assert len(page) == 4096


def test_the_msr_fills_the_page_and_latches_the_width():
    machine = machine_of()
    guest = XenGuest(machine, 0, bounce_gpa=BOUNCE)
    assert wrmsr(machine, 0x4000_0000, 0x5000).first(Injected) is None
    assert guest.read(0x5000, 4096) == hypercall_page()
    assert not xen(machine).domains[1].narrow
    narrow = machine_of(start="protected")
    wrmsr(narrow, 0x4000_0000, 0x5000)
    domain = xen(narrow).domains[1]
    assert domain.narrow
    shared = SharedInfo32.from_bytes(narrow.memory.read(domain.shared_info_spa, SharedInfo32.SIZE, None))
    assert (shared.wc_version, shared.wc_sec) == (2, int(RTC_EPOCH.timestamp()))  # the date, in the new place


@pytest.mark.parametrize("value", [0x5001, 0x5FFF, 0x7FFF_F000, 0xFFFF_FFFF_FFFF_F000])
def test_a_page_index_or_a_frame_that_is_not_there_is_gp(value):
    machine = machine_of()
    before = machine.memory.capture()
    assert wrmsr(machine, 0x4000_0000, value).first(Injected) == Injected(0, event(Vector.GP, EventType.EXCEPTION, 0))
    assert machine.memory.capture() == before


def test_other_msrs_near_it_do_not_exist_and_reading_gives_zero():
    machine = machine_of()
    assert wrmsr(machine, 0x4000_0001, 0).first(Injected).event & 0xFF == Vector.GP
    regs = registers_of(machine, rcx=0x4000_0000, rax=1, rdx=1)
    machine.apply(CpuExit(0, ExitCode.MSR, 0, 0, b"\x0f\x32", 0))
    assert (regs.rax, regs.rdx) == (0, 0)


def test_a_hyperv_guest_gets_hints_once_it_has_said_what_it_is():
    machine = machine_of(viridian=True)
    assert cpuid(machine, 0x4000_0004) == (0, 0, 0, 0)
    wrmsr(machine, 0x4000_0000, 1 << 48 | 4 << 40)
    eax, ebx, _, _ = cpuid(machine, 0x4000_0004)
    assert eax & (1 << 2 | 1 << 10 | 1 << 11) == 1 << 2 | 1 << 10 | 1 << 11
    assert ebx == 0x7FF


def test_hyperv_s_page_marks_its_calls_by_bit_31():
    machine = machine_of(viridian=True)
    wrmsr(machine, 0x4000_0001, 0x5001)
    guest = XenGuest(machine, 0, bounce_gpa=BOUNCE)
    assert guest.read(0x5000, 4096) == bytes.fromhex("0d000000800f01d9c3").ljust(4096, b"\xcc")
    guest.write(0x5000, bytes(16))
    assert wrmsr(machine, 0x4000_0001, 0x5000).first(Injected) is None  # not enabled
    assert guest.read(0x5000, 16) == bytes(16)
    assert wrmsr(machine, 0x4000_0001, 1 << 50 | 1).first(Injected) is None  # no such page: no fault
    regs = registers_of(machine, rcx=0x4000_0001, rax=0, rdx=0)
    machine.apply(CpuExit(0, ExitCode.MSR, 0, 0, b"\x0f\x32", 0))
    assert regs.rdx << 32 | regs.rax == 1 << 50 | 1


def test_without_hyperv_its_hypercall_msr_does_not_exist():
    assert wrmsr(machine_of(), 0x4000_0001, 0x5001).first(Injected) is not None
