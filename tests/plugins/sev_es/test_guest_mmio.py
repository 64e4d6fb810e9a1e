"""MMIO of the reference guest behind its own page tables: the C-bit there decides, not what the fault claims.

A hypervisor that turns a private page into a "device" gets no data out of it and puts none into it.
Source: Linux arch/x86/coco/sev/vc-handle.c (vc_slow_virt_to_phys: emulated MMIO to encrypted memory is not supported).
"""

from __future__ import annotations

import pytest
from sevlab.core.events import CpuExit, SetRegisters
from sevlab.plugins.sev_es import GhcbRequest, GuestFailed, GuestFault, GuestSetup, NaeCode, VcDelivered

from tests.plugins.sev_es.guests import GHCB_GPA, encrypted_machine

C_BIT = 1 << 51
TABLES = 0x2_0000
PRESENT, WRITABLE, LARGE = 1, 2, 1 << 7
DEVICE, HIDDEN, OPEN, READ_ONLY = 0xFEE0_0000, 0xFEC0_0000, 0x40_0000, 0x60_0000
"""Linear 2 MiB pages: a device; a device's address mapped with the C-bit; memory without it; one that is read-only."""
SECRET = b"private bytes..."
MMIO_READ, MMIO_WRITE = 0xD, 0xF


@pytest.fixture(scope="module")
def booted():
    machine = encrypted_machine(guest="linux", memory_bytes=8 << 20)
    vcpu = machine.vcpus[0]
    link = PRESENT | WRITABLE | C_BIT
    tables = [[0] * 512 for _ in range(4)]
    tables[0][0], tables[1][0], tables[1][3] = TABLES + 0x1000 | link, TABLES + 0x2000 | link, TABLES + 0x3000 | link
    leaf = PRESENT | WRITABLE | LARGE
    for number in range(4):
        tables[2][number] = number << 21 | leaf | C_BIT
    tables[2][OPEN >> 21] = OPEN | leaf
    tables[2][READ_ONLY >> 21] = READ_ONLY | PRESENT | LARGE
    tables[3][(DEVICE >> 21) & 511] = DEVICE | leaf
    tables[3][(HIDDEN >> 21) & 511] = HIDDEN | leaf | C_BIT
    raw = b"".join(word.to_bytes(8, "little") for table in tables for word in table)
    machine.access.guest_physical_write(vcpu, TABLES, raw, c_bit=True)
    machine.access.guest_physical_write(vcpu, 0x8000, SECRET, c_bit=True)
    machine.apply(GuestSetup(0, GHCB_GPA))
    vcpu.system.cs, vcpu.system.efer = (8, 0x29B, 0xFFFF_FFFF, 0), 0x1D01
    vcpu.system.cr0, vcpu.system.cr3, vcpu.system.cr4 = 0x8001_0011, TABLES | C_BIT, 0x20
    machine.mark()
    return machine


@pytest.fixture
def machine(booted):
    booted.reset()
    return booted


def fault(machine, insn, error, gpa, **regs):
    """The guest executes `insn`, and its hypervisor says that `gpa` is a device."""
    machine.apply(SetRegisters(0, (*regs.items(), ("rip", 0x1000))))
    outcome = machine.apply(CpuExit(0, 0x400, error, gpa, insn, 0))
    assert outcome.first(VcDelivered).error_code == 0x400
    return outcome


def test_a_device_is_served(machine):
    outcome = fault(machine, b"\x89\x07", MMIO_WRITE, DEVICE + 0xB0, rdi=DEVICE + 0xB0, rax=0x11)
    assert (outcome.first(GhcbRequest).exit_code, outcome.first(GhcbRequest).info_1) == (
        NaeCode.MMIO_WRITE,
        0xFEE0_00B0,
    )
    assert machine.vcpus[0].regs.rip == 0x1002


@pytest.mark.parametrize("named", [0x8000, DEVICE], ids=["its own address", "a device's address"])
@pytest.mark.parametrize(
    ("insn", "error"),
    [(b"\x89\x07", MMIO_WRITE), (b"\x8b\x07", MMIO_READ), (b"\xa4", MMIO_READ)],
    ids=["mov", "load", "movs"],
)
def test_its_own_private_page_is_no_device_whatever_the_fault_says(machine, insn, error, named):
    regs = {"rdi": 0x8000, "rax": 0x5555_5555}
    if insn == b"\xa4":
        regs = {"rsi": 0x8000, "rdi": 0x9000, "rcx": 1}
    before = machine.access.guest_physical_read(machine.vcpus[0], 0x8000, 4096, c_bit=True)
    outcome = fault(machine, insn, error, named, **regs)
    assert outcome.first(GhcbRequest) is None
    if insn == b"\xa4":  # both sides are memory: the guest copies, and asks nobody
        assert machine.access.guest_physical_read(machine.vcpus[0], 0x9000, 1, c_bit=True) == SECRET[:1]
    else:
        assert "encrypted memory" in outcome.first(GuestFailed).reason
        assert machine.vcpus[0].regs.rip == 0x1000
    assert machine.access.guest_physical_read(machine.vcpus[0], 0x8000, 4096, c_bit=True) == before


@pytest.mark.parametrize(
    ("insn", "error"), [(b"\x89\x07", MMIO_WRITE), (b"\x8b\x07", MMIO_READ)], ids=["write", "read"]
)
def test_an_address_outside_memory_is_private_where_the_c_bit_says_so(machine, insn, error):
    outcome = fault(machine, insn, error, HIDDEN, rdi=HIDDEN, rax=0x5555)
    assert outcome.first(GhcbRequest) is None
    assert "encrypted memory" in outcome.first(GuestFailed).reason


def test_a_page_that_the_guest_shares_is_the_hypervisor_s_to_serve(machine):
    outcome = fault(machine, b"\x8b\x07", MMIO_READ, OPEN, rdi=OPEN)
    assert outcome.first(GhcbRequest).info_1 == OPEN


def test_movs_between_a_device_and_private_memory_shows_only_what_goes_to_the_device(machine):
    outcome = fault(machine, b"\xa4", MMIO_WRITE, DEVICE, rsi=0x8000, rdi=DEVICE, rcx=1)
    request = outcome.first(GhcbRequest)
    assert (request.exit_code, request.data) == (NaeCode.MMIO_WRITE, SECRET[:1])


def test_a_page_that_is_not_writable_faults_before_anything_is_shown(machine):
    outcome = fault(machine, b"\x89\x07", MMIO_WRITE, READ_ONLY, rdi=READ_ONLY, rax=7)
    assert outcome.first(GhcbRequest) is None
    assert outcome.first(GuestFault).vector == 14
