"""A walk that is remembered finds what a walk would find, whoever changes the tables and however."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sevlab.core.access import HYPERVISOR
from sevlab.core.events import CacheOp, MapFlag, MemoryWrite, NptEdit, Party, Space
from sevlab.core.testing import make_machine
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins.xen.linear import KEPT, Walks
from sevlab.plugins.xen.startup import TABLES_FROM_END
from sevlab.plugins.xen.state import domain_of

PAGES = (0x1000, 0x20_0000, 0x40_0000)
ENTRIES = (0, 0x83, 0x20_0083, 0x20_00E3, 0x40_0081, 0x1)
"""Absent, identity, elsewhere, with accessed and dirty, read-only, a table at 0."""


def long_mode(**settings):
    machine = make_machine("io", "xen", guests=2, options={"xen": {"start": "long"}}, **settings)
    return machine, machine.vcpus[0], domain_of(machine, machine.vcpus[0])


@pytest.fixture
def world():
    return long_mode()


def tables_gpa(machine):
    return machine.vm_of(machine.vcpus[0]).memory_bytes - TABLES_FROM_END * PAGE_BYTES


def change(machine, vcpu, kind, index, entry):
    """Something that may change what a walk finds."""
    directory = tables_gpa(machine) + 2 * PAGE_BYTES
    data = entry.to_bytes(8, "little")
    memory_spa = machine.vm_of(vcpu).memory_spa
    if kind == "guest":
        machine.access.guest_physical_write(vcpu, directory + index * 8, data, c_bit=False)
    elif kind == "hypervisor":
        machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, memory_spa + directory + index * 8, False, data))
    elif kind == "whole page":
        machine.memory.write(memory_spa + directory, data * 512, None, HYPERVISOR.tag)
    elif kind == "key":
        key = machine.memory.install_key(bytes(range(32)), "moved")
        machine.memory.hand_over(memory_spa + directory, PAGE_BYTES, None, key, 9, len)
    elif kind == "nested":
        machine.apply(NptEdit(0, directory, memory_spa + index * PAGE_BYTES, PAGE_BYTES, WRITABLE))
    elif kind == "control":
        vcpu.system.cr0 ^= 1 << 16
    elif kind == "root":
        vcpu.system.cr3 = tables_gpa(machine) + index * PAGE_BYTES
    elif kind == "flush":
        machine.apply(CacheOp("invd", 0))
    else:
        getattr(machine, kind)()


WRITABLE = MapFlag.WRITABLE | MapFlag.USER
KINDS = ("guest", "hypervisor", "whole page", "key", "nested", "control", "root", "flush", "mark", "reset")


@pytest.mark.parametrize("caches", [False, True])
@settings(max_examples=20)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(KINDS), st.integers(0, 2), st.sampled_from(ENTRIES), st.sampled_from(PAGES), st.booleans()
        ),
        max_size=8,
    )
)
def test_what_is_remembered_is_what_a_walk_finds(caches, steps):
    machine, vcpu, domain = long_mode(caches=caches)
    walks = Walks()
    for kind, index, entry, linear, write in steps:
        for _ in range(2):  # the first may set accessed and dirty bits, the second is remembered
            remembered = walks.page(machine, vcpu, domain, linear, write=write)
            assert remembered == Walks().page(machine, vcpu, domain, linear, write=write)
        change(machine, vcpu, kind, index, entry)
        for page in PAGES:
            remembered = walks.page(machine, vcpu, domain, page, write=write)
            assert remembered == Walks().page(machine, vcpu, domain, page, write=write)


def test_a_walk_is_remembered_until_a_table_is_written(world, monkeypatch):
    machine, vcpu, domain = world
    walks = Walks()
    walks.page(machine, vcpu, domain, 0x1234, write=False)
    reads = []
    monkeypatch.setattr(type(machine.memory), "read", lambda *_: reads.append(1) or bytes(8))
    assert walks.page(machine, vcpu, domain, 0x1FFF, write=False)[0] == 0x1000
    assert not reads
    monkeypatch.undo()
    change(machine, vcpu, "guest", 5, 0)  # another entry of a table on the way
    monkeypatch.setattr(type(machine.memory), "read", lambda *_: reads.append(1) or bytes(8))
    walks.page(machine, vcpu, domain, 0x1FFF, write=False)
    assert reads


def test_two_domains_with_the_same_cr3_are_two(world):
    machine, vcpu, domain = world
    other = machine.vcpus[1]
    other.system.cr3 = vcpu.system.cr3
    walks = Walks()
    assert walks.page(machine, vcpu, domain, 0x1000, write=False)[0] == 0x1000
    change(machine, other, "guest", 0, 0x20_0083)
    assert walks.page(machine, other, domain_of(machine, other), 0x1000, write=False)[0] == 0x20_1000
    assert walks.page(machine, vcpu, domain, 0x1000, write=False)[0] == 0x1000


def test_memory_of_walks_is_bounded(world):
    machine, vcpu, domain = world
    walks = Walks()
    for page in range(KEPT + 1):
        walks.page(machine, vcpu, domain, page * PAGE_BYTES, write=False)
    assert len(walks._known) <= KEPT
