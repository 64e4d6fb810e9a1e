from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from sevlab.core.errors import ConfigError
from sevlab.core.events import (
    CacheOp,
    CpuidResult,
    Data,
    Done,
    HostCpuid,
    HostMsr,
    MemoryRead,
    MemoryWrite,
    Party,
    Space,
    Value,
)
from sevlab.core.generations import GENERATIONS
from sevlab.core.testing import assert_offsets, assert_resets, make_machine
from sevlab.plugins import sme
from sevlab.plugins.sme.layout import MEM_ENCRYPTION_MOD_EN
from sevlab.plugins.sme.states import PageAction, PageView

SPA = 0x20_0000
PAGE = bytes(range(256)) * 16


def read(machine, *, c_bit, party=Party.HYPERVISOR, length=4096, spa=SPA):
    return machine.apply(MemoryRead(party, 0, Space.SPA, spa, c_bit, length)).first(Data).data


def write(machine, data, *, c_bit, party=Party.HYPERVISOR, spa=SPA):
    assert machine.apply(MemoryWrite(party, 0, Space.SPA, spa, c_bit, data)).first(Done) is not None


@pytest.fixture
def machine():
    return make_machine("sme", options={"sme": {"enabled": True}})


def test_bits_of_syscfg_are_those_of_the_manual():
    # 24593, 7.10.2 and 15.36, typed from the document.
    assert_offsets(sme.SysCfg, {}, 8)
    bits = {"mtrr_fix_dram_mod_en": 19, "mem_encryption_mod_en": 23, "snp_en": 24, "vmpl_en": 25}
    for name, bit in bits.items():
        assert int.from_bytes(sme.SysCfg.build(**{name: 1}), "little") == 1 << bit


@pytest.mark.parametrize("name", GENERATIONS)
def test_cpuid_describes_the_generation(name):
    part = GENERATIONS[name]
    result = make_machine("sme", generation=name).apply(HostCpuid(0x8000_001F, 0)).first(CpuidResult)
    assert result.eax == 1 | part.coherent << 10
    assert result.ebx == part.c_bit | part.lost_bits << 6


def test_before_enabling_the_c_bit_means_nothing():
    machine = make_machine("sme")
    write(machine, PAGE, c_bit=True)
    assert read(machine, c_bit=False) == PAGE


def test_enabling_is_a_write_of_syscfg_and_stays_until_reset():
    machine = make_machine("sme")
    machine.apply(HostMsr(sme.SYSCFG, True, MEM_ENCRYPTION_MOD_EN))
    machine.apply(HostMsr(sme.SYSCFG, True, 1 << 19))
    assert machine.apply(HostMsr(sme.SYSCFG, False, 0)).first(Value) == Value(MEM_ENCRYPTION_MOD_EN | 1 << 19)


def test_with_the_c_bit_only_the_c_bit_reads_it_back(machine):
    write(machine, PAGE, c_bit=True)
    assert read(machine, c_bit=True) == PAGE
    assert read(machine, c_bit=False) != PAGE


@pytest.mark.parametrize("generation", ["milan", "turin"])
def test_a_cold_boot_reader_finds_the_ciphertext_of_the_boots_key(generation):
    machine = make_machine("sme", options={"sme": {"enabled": True}}, generation=generation)
    write(machine, PAGE, c_bit=True)
    key = machine.memory.key(sme.sme_state(machine).keys[0])
    assert len(key.xts_key) == (64 if generation == "turin" else 32)
    assert key.decrypt_page(SPA >> 12, machine.memory.dram(SPA, 4096)) == PAGE
    assert machine.memory.dram(SPA, 4096) != PAGE


def test_the_key_is_made_anew_at_each_boot():
    images = []
    for seed in (b"first boot", b"second boot"):
        machine = make_machine("sme", options={"sme": {"enabled": True}}, seed=seed)
        write(machine, PAGE, c_bit=True)
        images.append(machine.memory.dram(SPA, 4096))
    assert images[0] != images[1]


def test_a_device_reads_ciphertext_and_its_writes_are_garbage_to_the_host(machine):
    write(machine, PAGE, c_bit=True)
    assert read(machine, c_bit=False, party=Party.DMA) == machine.memory.dram(SPA, 4096)
    write(machine, b"from a device!!!", c_bit=False, party=Party.DMA)
    after = read(machine, c_bit=True)
    assert after[:16] not in (PAGE[:16], b"from a device!!!")
    assert after[16:] == PAGE[16:]


def test_encrypting_in_place_keeps_the_bytes_for_the_new_view(machine):
    write(machine, PAGE * 2, c_bit=False)
    sme.encrypt_in_place(machine, SPA, 8192)
    assert read(machine, c_bit=True, length=8192) == PAGE * 2
    assert PAGE not in machine.memory.dram(SPA, 8192)
    sme.decrypt_in_place(machine, SPA, 8192)
    assert machine.memory.dram(SPA, 8192) == PAGE * 2


@pytest.mark.parametrize(("spa", "length"), [(SPA + 1, 4096), (SPA, 4095)])
def test_only_whole_pages_are_converted(machine, spa, length):
    with pytest.raises(ConfigError, match="expected multiples of 0x1000"):
        sme.encrypt_in_place(machine, spa, length)


def test_the_procedure_works_with_modelled_caches_and_skipping_the_flush_loses_data():
    machine = make_machine("sme", options={"sme": {"enabled": True}}, generation="rome", caches=True)
    write(machine, PAGE, c_bit=False)
    sme.encrypt_in_place(machine, SPA)
    machine.apply(CacheOp("wbinvd", 0))
    assert read(machine, c_bit=True) == PAGE

    careless = make_machine("sme", options={"sme": {"enabled": True}}, generation="rome", caches=True)
    write(careless, PAGE, c_bit=True)
    careless.apply(CacheOp("wbinvd", 0))
    read(careless, c_bit=False)
    write(careless, b"\xff" * 4096, c_bit=True)
    assert read(careless, c_bit=False) == careless.memory.dram(SPA, 4096)
    stale = read(careless, c_bit=False)
    careless.apply(CacheOp("wbinvd", 0))
    assert read(careless, c_bit=False) != stale


def test_each_asid_has_its_own_slot_and_an_empty_one_is_plaintext(machine):
    key = sme.install_key(machine, 5, bytes(range(32)), "guest 5")
    assert machine.access.key_of(5, c_bit=True) is key
    assert machine.access.key_of(5, c_bit=False) is None
    assert machine.access.key_of(6, c_bit=True) is None
    sme.remove_key(machine, 5)
    assert machine.access.key_of(5, c_bit=True) is None


def test_sme_resets(machine):
    sme.install_key(machine, 5, bytes(range(32)), "guest 5")
    machine.mark()
    assert_resets(machine, HostMsr(sme.SYSCFG, True, 1 << 24), MemoryWrite(0, 0, 0, SPA, True, b"x"))


def test_every_pair_of_the_procedures_table():
    legal = {(pair.state, pair.message) for pair in sme.PAGE_IN_PLACE.pairs() if pair.target is not None}
    assert legal == {
        (PageView.PLAIN, PageAction.FLUSH),
        (PageView.FLUSHED, PageAction.FLUSH),
        (PageView.FLUSHED, PageAction.COPY_OUT),
        (PageView.COPIED, PageAction.COPY_IN_PRIVATE),
        (PageView.COPIED, PageAction.COPY_IN_SHARED),
        (PageView.ENCRYPTED, PageAction.FLUSH),
    }


class HostMemory(RuleBasedStateMachine):
    """The host's two views of a page against what a driver author expects: the last write of the same view wins."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = make_machine("sme", options={"sme": {"enabled": True}}, seed=b"stateful")
        self.content = bytes(4096)
        self.private = False

    @rule(fill=st.integers(0, 255))
    def rewrite(self, fill):
        self.content = bytes([fill]) * 4096
        write(self.machine, self.content, c_bit=self.private)

    @rule()
    def convert(self):
        (sme.decrypt_in_place if self.private else sme.encrypt_in_place)(self.machine, SPA)
        self.private = not self.private

    @rule()
    def look(self):
        assert read(self.machine, c_bit=self.private) == self.content
        assert (read(self.machine, c_bit=not self.private) == self.content) is False
        assert (self.machine.memory.dram(SPA, 4096) == self.content) == (not self.private)


TestHostMemory = HostMemory.TestCase
