"""Page tables, fetches and caches under SNP: what the attacks on plain SEV of the same name become."""

from __future__ import annotations

import pytest
from sevlab.core.access import AccessKind
from sevlab.core.cpu import FaultUnwind
from sevlab.core.events import CacheOp, Data, MemoryRead, MemoryWrite, NptEdit, Party, Space
from sevlab.plugins.snp import driver

from tests.plugins.snp.support import C_BIT, PRIVATE_GPA, SECRETS_GPA, SHARED_GPA, talking_machine

PML4, PDPT, PD, PT = (PRIVATE_GPA + number * 0x1000 for number in range(4))
P, W, U, ID = 1, 2, 4, 16
RMP, FINAL, WALK, ENC = 1 << 31, 1 << 32, 1 << 33, 1 << 34
NPF, VC, PF = 0x400, 29, 14
SECRET = b"the guest's own secret, 32 bytes"


@pytest.fixture(scope="module")
def shared():
    """A guest in long mode; its own tables map the first 2 MiB one to one, only the secrets page with the C-bit."""
    machine, _ = talking_machine()
    vcpu = machine.vcpus[0]
    write = lambda gpa, data: machine.access.guest_physical_write(vcpu, gpa, data, c_bit=True)
    for table, following in ((PML4, PDPT), (PDPT, PD), (PD, PT)):
        write(table, (following | 3).to_bytes(8, "little"))
    entry = lambda gpa: gpa | 3 | (C_BIT if gpa == SECRETS_GPA else 0)
    write(PT, b"".join(entry(gpa).to_bytes(8, "little") for gpa in range(0, 0x20_0000, 4096)))
    write(SECRETS_GPA + 0x800, SECRET)
    system = vcpu.system
    system.cr0, system.cr3, system.cr4, system.efer = 0x8000_0011, PML4, 0x20, 0x1500
    machine.mark()
    return machine


@pytest.fixture
def machine(shared):
    shared.reset()
    return shared


def spa(machine, gpa):
    return machine.hypervisor.vms[0].memory_spa + gpa


def read(machine, gva, count=32, kind=AccessKind.READ):
    """What the guest finds at a linear address, or the fault."""
    try:
        return machine.access.guest_read(machine.vcpus[0], gva, count, kind)
    except FaultUnwind as unwind:
        return unwind.fault


def host_write(machine, address, data):
    return machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, address, False, data)).records[0]


def test_walks_are_private_and_data_is_as_the_c_bit_says(machine):
    assert read(machine, SECRETS_GPA + 0x800) == SECRET
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, SHARED_GPA, False, b"for everybody"))
    assert read(machine, SHARED_GPA, 13) == b"for everybody"
    assert read(machine, PML4, 8) == machine.memory.dram(spa(machine, PML4), 8) != (PDPT | 3).to_bytes(8, "little")


def test_code_in_a_shared_page_is_never_executed(machine):
    """Under SEV a fetch is private and finds garbage; here the page is not the guest's, and the fetch faults."""
    assert read(machine, SECRETS_GPA + 0x800, 32, AccessKind.FETCH) == SECRET
    fault = read(machine, SHARED_GPA, 32, AccessKind.FETCH)
    assert tuple(fault) == (NPF, P | U | ID | RMP | FINAL | ENC, SHARED_GPA)


@pytest.mark.parametrize("table", [PML4, PDPT, PD, PT], ids=["PML4", "PDPT", "PD", "PT"])
def test_another_page_in_the_place_of_a_page_table_is_a_fault_of_the_walk(machine, table):
    """Plain SEV walks whatever the hypervisor maps there."""
    machine.apply(NptEdit(0, table, spa(machine, SECRETS_GPA), 4096, 3))
    fault = read(machine, SECRETS_GPA + 0x800)
    assert (fault.vector, fault.address & -4096) == (NPF, table)
    assert fault.error_code == P | U | RMP | WALK | ENC


@pytest.mark.parametrize("table", [PML4, PT], ids=["PML4", "PT"])
def test_a_page_table_cannot_be_written_and_not_be_taken_unnoticed(machine, table):
    address, asid = spa(machine, table), machine.vcpus[0].vmcb.guest_asid
    before = machine.memory.dram(address, 4096)
    assert (host_write(machine, address, bytes(16)).vector, machine.memory.dram(address, 4096)) == (PF, before)
    assert driver.rmp_update(machine, address) == 0
    fault = read(machine, SECRETS_GPA + 0x800)
    assert (fault.vector, fault.error_code) == (NPF, P | U | RMP | WALK | ENC)
    assert driver.rmp_update(machine, address, gpa=table, assigned=1, asid=asid) == 0
    fault = read(machine, SECRETS_GPA + 0x800)
    assert (fault.vector, fault.error_code, fault.address) == (VC, 0x404, SECRETS_GPA + 0x800)


def test_a_c_bit_that_the_guest_forgot_gives_ciphertext_and_no_write(machine):
    """The guest's own mistake stays possible to read, as under SEV; a write with it faults and spoils nothing."""
    shown = read(machine, PD, 16)
    assert shown == machine.memory.dram(spa(machine, PD), 16)
    with pytest.raises(FaultUnwind) as caught:
        machine.access.guest_write(machine.vcpus[0], PD, bytes(16))
    assert caught.value.fault.vector == NPF
    assert caught.value.fault.error_code == P | U | W | RMP | FINAL
    assert machine.memory.dram(spa(machine, PD), 16) == shown


# Caches ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cached_machine():
    machine, _ = talking_machine(caches=True)
    return machine


@pytest.fixture
def cached(cached_machine):
    cached_machine.reset()
    return cached_machine


def guest_write(machine, data):
    machine.access.guest_physical_write(machine.vcpus[0], PRIVATE_GPA, data, c_bit=True)


def guest_read(machine, count=16):
    return machine.access.guest_physical_read(machine.vcpus[0], PRIVATE_GPA, count, c_bit=True)


def test_dropped_lines_still_take_the_guest_back(cached):
    """CacheWarp (CVE-2023-20592) remains: the RMP guards who writes, not which write reaches memory."""
    guest_write(cached, b"access granted !")
    cached.apply(CacheOp("wbinvd", 0))
    guest_write(cached, b"access revoked !")
    cached.apply(CacheOp("invd", 0))
    assert guest_read(cached) == b"access granted !"


def test_written_back_lines_are_the_guest_s_last_write(cached):
    guest_write(cached, b"access granted !")
    guest_write(cached, b"access revoked !")
    cached.apply(CacheOp("wbinvd", 0))
    cached.apply(CacheOp("invd", 0))
    assert guest_read(cached) == b"access revoked !"


def test_the_host_leaves_no_dirty_line_over_a_private_page(cached):
    """Plain SEV: a host's line of the address, written back later, spoils the guest's page. Here the write faults."""
    guest_write(cached, SECRET)
    cached.apply(CacheOp("wbinvd", 0))
    address = spa(cached, PRIVATE_GPA)
    step = MemoryRead(Party.HYPERVISOR, 0, Space.SPA, address, False, 32)
    assert cached.apply(step).first(Data).data not in (SECRET, b"")
    for party in (Party.HYPERVISOR, Party.DMA):
        answer = cached.apply(MemoryWrite(party, 0, Space.SPA, address, False, bytes(32))).records[0]
        assert (answer.vector, answer.error_code) == (PF, RMP | P | W)
    cached.apply(CacheOp("wbinvd", 0))
    assert guest_read(cached, 32) == SECRET


def test_a_flush_of_the_page_shows_ciphertext_only(cached):
    guest_write(cached, SECRET)
    cached.apply(CacheOp("clflush", spa(cached, PRIVATE_GPA)))
    assert SECRET not in cached.memory.dram(spa(cached, PRIVATE_GPA), 4096)
    assert guest_read(cached, 32) == SECRET
