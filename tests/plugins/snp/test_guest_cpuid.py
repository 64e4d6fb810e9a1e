"""The reference guest answers CPUID from its CPUID page; the hypervisor says only what the page leaves to it."""

from __future__ import annotations

import pytest
from sevlab.core.events import CpuExit, Done, SetRegisters
from sevlab.core.svm import ExitCode
from sevlab.plugins.sev_es import CR4_OSXSAVE, ForgeMsr, ForgeReply, GhcbRequest, GuestFailed, MsrReply, Terminated
from sevlab.plugins.snp.cpuid_table import build_table
from sevlab.plugins.snp.driver import LaunchPage
from sevlab.plugins.snp.guest_cpuid import CR4_PKE, NoValidAnswer, table_of, xsave_bytes
from sevlab.plugins.snp.guest_pages import CpuidEntry, CpuidHeader
from sevlab.plugins.snp.launch_digest import PageType
from sevlab.plugins.snp.records import UseCpuidPage

from tests.plugins.snp.support import PRIVATE_GPA, talking_machine

CPUID_GPA = 0x4000
LEAVES = ((0, 0), (1, 0), (7, 0), (0xB, 0), (0x8000_0000, 0), (0x8000_001E, 0), (0x8000_001F, 0))
AREA = ((0xD, 0, (7, 0, 0x340, 0)), (0xD, 1, (0xF, 0, 0, 0)), (0xD, 2, (0x100, 0x240, 0, 0)))


@pytest.fixture(scope="module")
def booted():
    """A guest that has read its CPUID page; the hypervisor's own answers differ from it in every register."""
    probe, _ = talking_machine()
    rows = tuple((leaf, sub, probe.cpuid(None, leaf, sub)) for leaf, sub in LEAVES)
    rows = tuple((leaf, sub, (0xD, *regs[1:]) if not leaf else regs) for leaf, sub, regs in rows)
    page = build_table((*rows, *((0x8000_0021, 0, (0x45, 0, 0, 0)),)), 4096)
    area = b"".join(
        CpuidEntry.build(eax_in=leaf, ecx_in=sub, xcr0_in=1, eax=regs[0], ebx=regs[1], ecx=regs[2], edx=regs[3])
        for leaf, sub, regs in AREA
    )
    count = len(rows) + 1
    used = CpuidHeader.SIZE + count * CpuidEntry.SIZE
    page = (CpuidHeader.build(count=count + 3) + page[CpuidHeader.SIZE : used] + area).ljust(4096, b"\0")
    options = {"sev_es": {"features": 0b11, "guest": "linux"}}
    machine, _ = talking_machine(options=options, pages=(LaunchPage(CPUID_GPA, PageType.UNMEASURED, page),))
    assert Done() in machine.apply(UseCpuidPage(0, CPUID_GPA)).records
    machine.mark()
    return machine, {leaf: regs for leaf, sub, regs in rows if not sub}


@pytest.fixture
def guest(booted):
    machine, rows = booted
    machine.reset()
    return machine, rows


def execute(machine, leaf, subleaf=0):
    """CPUID by the guest: its outcome, and EAX, EBX, ECX, EDX."""
    machine.apply(SetRegisters(0, (("rax", leaf), ("rcx", subleaf), ("rip", 0x1000))))
    outcome = machine.apply(CpuExit(0, ExitCode.CPUID, 0, 0, b"\x0f\xa2", 0))
    regs = machine.vcpus[0].regs
    return outcome, (regs.rax, regs.rbx, regs.rcx, regs.rdx)


@pytest.mark.parametrize("leaf", [0, 0x8000_0000, 0x8000_001F, 0x8000_0021])
def test_a_function_of_the_table_makes_no_exit(guest, leaf):
    machine, rows = guest
    outcome, registers = execute(machine, leaf)
    assert outcome.first(GhcbRequest) is None
    assert registers == rows.get(leaf, (0x45, 0, 0, 0))
    assert machine.vcpus[0].regs.rip == 0x1002


@pytest.mark.parametrize("leaf", [2, 0xC, 0xE, 0x4000_0000, 0x8000_0002, 0x8000_0022, 0xFFFF_FFFF])
def test_a_function_that_the_table_has_not_is_zero_and_nobody_is_asked(guest, leaf):
    machine, _ = guest
    outcome, registers = execute(machine, leaf)
    assert outcome.first(GhcbRequest) is None
    assert registers == (0, 0, 0, 0)


def test_the_hypervisor_says_the_apic_id_and_nothing_else_of_function_1(guest):
    machine, rows = guest
    _, honest = execute(machine, 1)
    for offset in (0x1F8, 0x318, 0x308, 0x310):  # RAX, RBX, RCX, RDX
        machine.apply(ForgeReply(0, offset, b"\xff" * 8))
    outcome, registers = execute(machine, 1)
    assert outcome.first(GhcbRequest).exit_code == ExitCode.CPUID
    own = rows[1]
    assert registers == (own[0], own[1] & 0xFF_FFFF | 0xFF00_0000, own[2], own[3] | 1 << 9)
    assert honest[0] == own[0]


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (0xB, lambda own: (*own[:3], 0x1234_5678)),
        (0x8000_001E, lambda own: (0x1234_5678, own[1] & ~0xFF | 0x78, own[2] & ~0xFF | 0x78, own[3])),
    ],
    ids=["0xb", "0x8000001e"],
)
def test_topology_is_the_hypervisor_s_in_these_bits(guest, leaf, expected):
    machine, rows = guest
    for offset in (0x1F8, 0x318, 0x308, 0x310):
        machine.apply(ForgeReply(0, offset, (0x1234_5678).to_bytes(8, "little")))
    assert execute(machine, leaf)[1] == expected(rows[leaf])


def test_what_cr4_enables_shows_in_functions_1_and_7(guest):
    machine, rows = guest
    system = machine.vcpus[0].system
    system.cr4 |= CR4_OSXSAVE | CR4_PKE
    assert execute(machine, 1)[1][2] == rows[1][2] | 1 << 27
    assert execute(machine, 7)[1][2] == rows[7][2] | 1 << 4
    system.cr4 &= ~(CR4_OSXSAVE | CR4_PKE)
    assert execute(machine, 7)[1][2] == rows[7][2] & ~(1 << 4)


@pytest.mark.parametrize(
    ("xcr0", "subleaf", "size"), [(1, 0, 0x240), (3, 0, 0x240), (7, 0, 0x340), (7, 1, 0x340), (3, 1, 0x240)]
)
def test_the_size_of_the_xsave_area_is_computed(guest, xcr0, subleaf, size):
    machine, _ = guest
    system = machine.vcpus[0].system
    system.cr4 |= CR4_OSXSAVE
    system.xcr0 = xcr0
    outcome, registers = execute(machine, 0xD, subleaf)
    assert outcome.first(GhcbRequest) is None
    assert registers[1] == size
    system.cr4 &= ~CR4_OSXSAVE
    assert execute(machine, 0xD, subleaf)[1][1] == 0x240


def test_a_feature_that_the_table_has_not_is_no_valid_state(guest):
    machine, _ = guest
    system = machine.vcpus[0].system
    system.cr4 |= CR4_OSXSAVE
    system.xcr0 = 1 << 5 | 3
    assert "no valid answer" in execute(machine, 0xD)[0].first(GuestFailed).reason
    assert machine.vcpus[0].regs.rip == 0x1000


def test_a_feature_counts_once():
    entry = CpuidEntry.from_bytes(CpuidEntry.build(eax_in=0xD, ecx_in=2, eax=0x100, ebx=0x240))
    assert xsave_bytes((entry, entry), 4, compacted=True) == 0x340
    with pytest.raises(NoValidAnswer):
        xsave_bytes((entry,), 1 << 63 | 4, compacted=True)


BAD_ANSWERS = {
    "an exception": [(0x398, (1).to_bytes(8, "little") + (0x8000_030D).to_bytes(8, "little"))],
    "malformed": [(0x398, (2).to_bytes(8, "little"))],
    "RDX not valid": [(0x3F0, bytes(16))],
}


@pytest.mark.parametrize("forged", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
@pytest.mark.parametrize("leaf", [1, 0xB, 0x8000_001E])
def test_no_answer_where_one_is_needed_ends_the_guest_with_cpuid_hv(guest, leaf, forged):
    machine, _ = guest
    for offset, data in forged:
        machine.apply(ForgeReply(0, offset, data))
    ended = execute(machine, leaf)[0].first(Terminated)
    assert (ended.reason_set, ended.reason_code) == (1, 5)


@pytest.mark.parametrize("lie", [0x004, 0x013, 0, (1 << 64) - 1], ids=hex)
def test_before_the_ghcb_the_msr_says_the_apic_id_or_the_guest_ends(guest, lie):
    machine, rows = guest
    machine.components["sev_es.guest"].vcpus[0].ghcb_gpa = -1
    outcome, registers = execute(machine, 1)
    assert sum(isinstance(record, MsrReply) for record in outcome.records) == 4
    assert registers[0] == rows[1][0]
    machine.apply(ForgeMsr(0, lie))
    ended = execute(machine, 1)[0].first(Terminated)
    assert (ended.reason_set, ended.reason_code) == (1, 5)


def test_before_the_ghcb_the_rest_is_the_table_s(guest):
    machine, rows = guest
    machine.components["sev_es.guest"].vcpus[0].ghcb_gpa = -1
    outcome, registers = execute(machine, 0x8000_001F)
    assert outcome.first(MsrReply) is None
    assert registers == rows[0x8000_001F]


@pytest.mark.parametrize("count", [0, 65, 0xFFFF_FFFF])
def test_a_page_with_an_impossible_count_ends_the_guest(guest, count):
    machine, _ = guest
    page = CpuidHeader.build(count=count).ljust(4096, b"\0")
    assert table_of(page) == ()
    machine.access.guest_physical_write(machine.vcpus[0], CPUID_GPA, page, c_bit=True)
    ended = machine.apply(UseCpuidPage(0, CPUID_GPA)).first(Terminated)
    assert (ended.reason_set, ended.reason_code) == (1, 4)


def test_sixty_four_functions_are_read_to_the_last(guest):
    machine, _ = guest
    rows = tuple((0x8000_0000 + n, 0, (0x8000_003F, n, n, n)) for n in range(64))
    page = build_table(rows, 4096)
    machine.access.guest_physical_write(machine.vcpus[0], PRIVATE_GPA, page, c_bit=True)
    assert Done() in machine.apply(UseCpuidPage(0, PRIVATE_GPA)).records
    assert execute(machine, 0x8000_003F)[1] == (0x8000_003F, 63, 63, 63)


def test_without_a_cpuid_page_the_hypervisor_is_asked():
    options = {"sev_es": {"features": 0b11, "guest": "linux"}}
    machine, _ = talking_machine(options=options)
    assert execute(machine, 0)[0].first(GhcbRequest).exit_code == ExitCode.CPUID
