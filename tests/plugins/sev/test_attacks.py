"""What SEV does not protect: these tests pass because the attack works."""

from __future__ import annotations

import hashlib

import pytest
from sevlab.core.access import AccessKind
from sevlab.core.events import Data, MapFlag, MemoryRead, MemoryWrite, NptEdit, Party, Space
from sevlab.core.testing import make_machine
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, Policy, Status, driver

from tests.plugins.sev.world import MEMORY, PAGE, rejected

SECRET = b"the root password is hunter2 ...".ljust(PAGE, b".")
WEB_PAGE = b"<html>a page for everybody</html>".ljust(PAGE, b" ")


@pytest.fixture
def launched():
    machine = make_machine("sev", guests=(MEMORY,))
    guest = sev.launch_guest(machine, 0, loads={0x1000: SECRET, 0x2000: WEB_PAGE})
    return machine, guest


def guest_reads(machine, gpa, length=PAGE, *, c_bit=True):
    return machine.apply(MemoryRead(Party.GUEST, 0, Space.GPA, gpa, c_bit, length)).first(Data).data


def guest_writes(machine, gpa, data, *, c_bit=True):
    machine.apply(MemoryWrite(Party.GUEST, 0, Space.GPA, gpa, c_bit, data))


def cells(machine, gpa, length=PAGE):
    spa = machine.hypervisor.vms[0].memory_spa + gpa
    return driver.get(machine, spa, length)


def test_remapping_a_page_makes_the_guest_give_its_secret_away(launched):
    """SEVered: the service asks for its web page and gets the page of the secret. Source: arXiv 1805.09604."""
    machine, _ = launched
    spa = machine.hypervisor.vms[0].memory_spa
    assert guest_reads(machine, 0x2000) == WEB_PAGE
    machine.apply(NptEdit(0, 0x2000, spa + 0x1000, PAGE, MapFlag.WRITABLE | MapFlag.USER))
    answered = guest_reads(machine, 0x2000)
    guest_writes(machine, 0x5000, answered, c_bit=False)
    assert cells(machine, 0x5000) == SECRET


def test_old_ciphertext_is_accepted_as_the_present_content(launched):
    """Replay: no freshness. Source: spec 24593 names no integrity for SEV; arXiv 1612.01119."""
    machine, _ = launched
    spa = machine.hypervisor.vms[0].memory_spa + 0x1000
    old = cells(machine, 0x1000)
    guest_writes(machine, 0x1000, b"access revoked".ljust(PAGE, b"."))
    assert cells(machine, 0x1000) != old
    driver.put(machine, spa, old)
    assert guest_reads(machine, 0x1000) == SECRET


def test_a_written_ciphertext_block_is_garbage_of_16_bytes_and_nobody_notices(launched):
    machine, _ = launched
    spa = machine.hypervisor.vms[0].memory_spa + 0x1000
    driver.put(machine, spa + 32, bytes(16))
    seen = guest_reads(machine, 0x1000)
    assert seen[:32] + seen[48:] == SECRET[:32] + SECRET[48:]
    assert seen[32:48] != SECRET[32:48]


def test_blocks_moved_before_the_launch_give_the_same_digest():
    """undeSErVed: the digest covers the order of loading, not the addresses. Source: Wilke et al., 2021, section 3."""
    blocks = [bytes((number,)) * 16 for number in range(256)]
    honest = [(16 * number, block) for number, block in enumerate(blocks)]
    moved = [(16 * (number ^ 1), block) for number, block in enumerate(blocks)]
    digests, contents = [], []
    for places in (honest, moved):
        machine = make_machine("sev", guests=(MEMORY,))
        guest = sev.begin_launch(machine, 0)
        vm = machine.hypervisor.vms[0]
        for gpa, block in places:
            driver.load(machine, vm, guest, gpa, block)
        digests.append(sev.sev_state(machine).guests[guest.handle].digest.digest())
        contents.append(guest_reads(machine, 0))
    assert digests[0] == digests[1] == hashlib.sha256(b"".join(blocks)).digest()
    assert contents[0] != contents[1]
    assert sorted(contents[0]) == sorted(contents[1])


def test_dbg_decrypt_reads_a_guest_whose_policy_allows_it(launched):
    machine, guest = launched
    page = driver.scratch_page(machine) + PAGE
    fields = {
        "handle": guest.handle,
        "source_spa": machine.hypervisor.vms[0].memory_spa + 0x1000,
        "destination_spa": page,
        "length": PAGE,
    }
    sev.need(machine, Command.DBG_DECRYPT, **fields)
    assert driver.get(machine, page, PAGE) == SECRET


def test_dbg_decrypt_is_refused_where_the_policy_says_so():
    machine = make_machine("sev", guests=(MEMORY,))
    guest = sev.launch_guest(machine, 0, policy=Policy.NODBG, loads={0x1000: SECRET})
    fields = {
        "handle": guest.handle,
        "source_spa": machine.hypervisor.vms[0].memory_spa + 0x1000,
        "destination_spa": driver.scratch_page(machine) + PAGE,
        "length": PAGE,
    }
    assert rejected(machine, Command.DBG_DECRYPT, **fields) == Status.POLICY_FAILURE


def test_equal_plaintext_at_one_address_shows_as_equal_ciphertext(launched):
    """The ciphertext side channel: a bit of a key that comes back is seen to come back. Source: CIPHERLEAKS, 2021."""
    machine, _ = launched
    seen = []
    for bit in (0, 1, 1, 0, 1, 0, 0):
        guest_writes(machine, 0x3000, bytes((bit,)) * 16)
        seen.append(cells(machine, 0x3000, 16))
    names = {cipher: number for number, cipher in enumerate(dict.fromkeys(seen))}
    assert [names[cipher] for cipher in seen] == [0, 1, 1, 0, 1, 0, 0]


def test_equal_plaintext_at_two_addresses_does_not_show(launched):
    machine, _ = launched
    guest_writes(machine, 0x3000, SECRET)
    assert cells(machine, 0x3000) != cells(machine, 0x1000)


# Devices and the walker ---------------------------------------------------------------------------------------------


def test_dma_reads_ciphertext_of_a_private_page_and_plaintext_of_a_shared_one(launched):
    machine, _ = launched
    spa = machine.hypervisor.vms[0].memory_spa
    guest_writes(machine, 0x4000, WEB_PAGE, c_bit=False)
    for gpa, plaintext, shared in ((0x1000, SECRET, False), (0x4000, WEB_PAGE, True)):
        read = machine.apply(MemoryRead(Party.DMA, 0, Space.SPA, spa + gpa, False, PAGE)).first(Data).data
        assert (read == plaintext) == shared
        assert read == cells(machine, gpa)


def test_dma_into_a_private_page_is_garbage_to_the_guest(launched):
    machine, _ = launched
    spa = machine.hypervisor.vms[0].memory_spa
    packet = b"a packet from the network......."
    machine.apply(MemoryWrite(Party.DMA, 0, Space.SPA, spa + 0x1000, False, packet))
    seen = guest_reads(machine, 0x1000)
    assert packet not in seen
    assert seen[32:] == SECRET[32:]
    machine.apply(MemoryWrite(Party.DMA, 0, Space.SPA, spa + 0x4000, False, packet))
    assert guest_reads(machine, 0x4000, 32, c_bit=False) == packet


def paged_machine():
    """A guest in long mode whose tables at 0x10000 map the first 2 MiB one to one without the C-bit."""
    machine = make_machine("sev", guests=(MEMORY,))
    entry = lambda gpa, flags=3: (gpa | flags).to_bytes(8, "little")
    tables = {
        0x10000: entry(0x11000),
        0x11000: entry(0x12000),
        0x12000: entry(0x13000),
        0x13000: b"".join(entry(gpa) for gpa in range(0, 0x20000, PAGE)),
    }
    loads = {gpa: data.ljust(PAGE, b"\0") for gpa, data in tables.items()} | {0x1000: SECRET}
    sev.launch_guest(machine, 0, loads=loads)
    system = machine.vcpus[0].system
    system.cr0, system.cr3, system.cr4, system.efer = 0x8000_0011, 0x10000, 0x20, 0x1500
    return machine


def test_page_walks_and_fetches_are_private_whatever_the_c_bit_says():
    machine = paged_machine()
    vcpu = machine.vcpus[0]
    assert machine.access.guest_read(vcpu, 0x1000, 32, AccessKind.FETCH) == SECRET[:32]
    assert machine.access.guest_read(vcpu, 0x1000, 32) == cells(machine, 0x1000, 32)
