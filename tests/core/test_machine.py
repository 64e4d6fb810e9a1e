from __future__ import annotations

import pytest
import sevlab_stranger as stranger
from hypothesis import given, settings
from hypothesis import strategies as st
from sevlab.core import events as ev
from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.errors import ConfigError, InvariantViolation, PluginError
from sevlab.core.machine import Machine
from sevlab.core.oracle import OracleSink
from sevlab.core.testing import assert_changes_nothing, assert_resets, make_machine, step_strategy
from sevlab.core.units import PAGE_2M_BYTES, PAGE_BYTES
from sevlab.core.vocabulary import Outcome, spec_of

MACHINE = make_machine("sme", given={"stranger": stranger}, guests=2, memory_bytes=1 << 30, caches=False)
STEPS = step_strategy(MACHINE.vocabulary)


@given(st.lists(STEPS, max_size=12))
@settings(max_examples=150)
def test_no_step_raises_and_reset_undoes_all(steps):
    MACHINE.reset()
    for step in steps:
        outcome = MACHINE.apply(step)
        assert isinstance(outcome, Outcome)
        for record in outcome.records:
            MACHINE.vocabulary.decode(MACHINE.vocabulary.encode(record))
    MACHINE.reset()
    assert MACHINE.snapshot() == BOOTED


BOOTED = MACHINE.snapshot()


@given(st.lists(STEPS, max_size=8), st.lists(STEPS, max_size=4))
def test_restoring_a_snapshot_is_the_machine(before, after):
    MACHINE.reset()
    for step in before:
        MACHINE.apply(step)
    snapshot = MACHINE.snapshot()
    first = [MACHINE.apply(step) for step in after]
    MACHINE.restore(snapshot)
    assert MACHINE.snapshot() == snapshot
    assert [MACHINE.apply(step) for step in after] == first


@given(st.lists(STEPS, max_size=8))
def test_the_same_configuration_and_steps_give_the_same_machine(steps):
    MACHINE.reset()
    other = make_machine("sme", given={"stranger": stranger}, guests=2, memory_bytes=1 << 30)
    assert [MACHINE.apply(step) for step in steps] == [other.apply(step) for step in steps]
    assert MACHINE.snapshot() == other.snapshot()


def test_a_snapshot_of_one_machine_fits_another():
    first, second = make_machine("sme"), make_machine("sme")
    first.apply(ev.MemoryWrite(ev.Party.HYPERVISOR, 0, ev.Space.SPA, 0x5000, False, b"moved"))
    second.restore(first.snapshot())
    assert second.access.hypervisor_read(0x5000, 5) == b"moved"


def test_another_seed_gives_other_keys():
    keys = [make_machine("sme", seed=seed).memory.key(1).xts_key for seed in (b"a", b"b", b"a")]
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]


def test_two_machines_share_nothing():
    first, second = make_machine("sme", guests=1), make_machine("sme", guests=1)
    first.apply(ev.SetRegisters(0, (("rax", 5),)))
    first.apply(ev.MemoryWrite(ev.Party.HYPERVISOR, 0, ev.Space.SPA, 0x5000, False, b"x"))
    assert second.vcpus[0].regs.rax == 0
    assert second.access.hypervisor_read(0x5000, 1) == b"\0"


def test_a_step_of_a_missing_plugin_is_refused():
    outcome = make_machine("sme").apply(stranger.Event(1, 2))
    assert outcome.first(ev.Refused).reason == "no plugin handles a step of kind 'stranger.event'"


@pytest.mark.parametrize(
    "step",
    [
        ev.CpuExit(99, 0x72, 0, 0, b"", 0),
        ev.SetRegisters(99, ()),
        ev.SetRegisters(0, (("rax", 1), ("bogus", 1))),
        ev.SetRegisters(0, (("rax", 1), ("rbx", 1 << 64))),
        ev.MemoryRead(ev.Party.GUEST, 99, ev.Space.GPA, 0, False, 1),
        ev.MemoryRead(ev.Party.ASP, 0, ev.Space.SPA, 0, False, 1),
        ev.MemoryRead(9, 0, ev.Space.SPA, 0, False, 1),
        ev.MemoryRead(ev.Party.HYPERVISOR, 0, ev.Space.GPA, 0, False, 1),
        ev.MemoryRead(ev.Party.HYPERVISOR, 0, ev.Space.SPA, 0, False, (1 << 20) + 1),
        ev.MemoryWrite(ev.Party.HYPERVISOR, 0, ev.Space.SPA, 0, False, bytes((1 << 20) + 1)),
        ev.VmcbWrite(99, 0, b""),
        ev.VmcbWrite(0, 0x3FF, b"ab"),
        ev.CacheOp("explode", 0),
        ev.Race(0, 0, b""),
        ev.AspCommand("sev", 0, 0, b""),
    ],
)
def test_impossible_steps_are_refused_and_change_nothing(step):
    machine = make_machine("sme", guests=1)
    assert assert_changes_nothing(machine, step).first(ev.Refused) is not None


def test_the_longest_access_is_served():
    machine = make_machine("sme")
    read = ev.MemoryRead(ev.Party.HYPERVISOR, 0, ev.Space.SPA, 0, False, 1 << 20)
    assert len(machine.apply(read).first(ev.Data).data) == 1 << 20


def test_steps_reset():
    assert_resets(
        make_machine("sme", given={"stranger": stranger}, guests=2),
        ev.SetRegisters(1, (("rax", 1), ("cr3", 0x1000))),
        ev.MemoryWrite(ev.Party.GUEST, 1, ev.Space.GPA, 0x5000, False, b"x"),
        ev.NptEdit(0, 0x5000, 0, PAGE_BYTES, ev.MapFlag.UNMAP),
        ev.HostMsr(0xC001_0010, True, 1 << 23),
        ev.AdvanceClock(5),
        ev.Schedule(),
        ev.CpuExit(0, 0x400, 0, 0, b"", 0),
    )


@pytest.mark.parametrize("caches", [False, True])
def test_a_reset_forgets_what_came_from_a_changed_nested_table(caches):
    machine = make_machine("sme", guests=2, caches=caches)
    roots = [vm.npt_root for vm in machine.hypervisor.vms.values()]
    vcpu = machine.vcpus[0]
    mine, other = (machine.access.translate_gpa(machine.vcpus[n], 0x5000) for n in (0, 1))
    assert mine != other
    machine.mark()
    entry = machine.access.hypervisor_read(roots[1], 8)
    for _ in range(2):  # the second time with translations of the marked tables at hand
        machine.apply(ev.MemoryWrite(ev.Party.HYPERVISOR, 0, ev.Space.SPA, roots[0], False, entry))
        assert machine.access.translate_gpa(vcpu, 0x5000) == other
        machine.apply(ev.CacheOp("invd", 0))
        machine.reset()
        assert machine.access.translate_gpa(vcpu, 0x5000) == mine
        machine.apply(ev.NptEdit(0, 0x5000, 0, PAGE_BYTES, ev.MapFlag.UNMAP))
        assert machine.access.translate_gpa(vcpu, 0x5000) is None
        machine.reset()
        assert machine.access.translate_gpa(vcpu, 0x5000) == mine
        machine.reset()


TWINS = tuple(make_machine("sme", guests=(GuestConfig(memory_bytes=8 << 20),)) for _ in range(2))
TWIN = TWINS[0].snapshot()
TABLE_STEPS = st.one_of(
    st.builds(
        ev.NptEdit,
        st.just(0),
        st.sampled_from((0x5000, 0x20_0000)),
        st.sampled_from((0, 0x40_0000, 0x60_0000)),
        st.sampled_from((PAGE_BYTES, PAGE_2M_BYTES)),
        st.sampled_from((3, 7, 16)),
    ),
    st.tuples(st.integers(0, 3), st.sampled_from((0, 1, 0x40_0007, 0x40_00E7))),
    st.sampled_from(("reset", "reset", "mark", "snapshot")),
)


@given(st.lists(st.tuples(TABLE_STEPS, st.sampled_from((0x5000, 0x20_0000)), st.booleans()), max_size=12))
@settings(max_examples=60)
def test_translations_that_outlive_a_reset_are_those_of_a_walk(steps):
    """Two machines do the same; one forgets everything at each reset."""
    keeping, plain = TWINS
    for machine in TWINS:
        machine.restore(TWIN)
        machine.mark()
    for step, gpa, write in steps:
        found = []
        for machine in TWINS:
            vcpu = machine.vcpus[0]
            if step == "snapshot":
                machine.restore(machine.snapshot())
            elif isinstance(step, str):
                getattr(machine, step)()
                plain.access._kept.clear()
            elif isinstance(step, ev.NptEdit):
                machine.apply(step)
            else:  # an entry of one of the tables, behind the back of whoever knows a translation
                level, entry = step
                spa = machine.hypervisor.vms[0].npt_root + level * PAGE_BYTES
                machine.apply(
                    ev.MemoryWrite(ev.Party.HYPERVISOR, 0, ev.Space.SPA, spa, False, entry.to_bytes(8, "little"))
                )
            outcomes = machine.apply(ev.MemoryWrite(ev.Party.GUEST, 0, ev.Space.GPA, gpa, False, b"x")) if write else ()
            found.append((machine.access.translate_gpa(vcpu, gpa), outcomes))
        assert found[0] == found[1]
    assert keeping.snapshot() == plain.snapshot()


class Broken:
    """A step handler that breaks a rule, put into a machine's table."""

    def __init__(self, machine):
        self.machine = machine

    def __call__(self, machine, step):
        machine.emit(ev.Done())
        raise InvariantViolation("test.rule", "it broke")


def broken_machine():
    machine = make_machine("sme")
    machine.tables.steps[ev.AdvanceClock] = Broken(machine)
    return machine


def test_a_violation_leaves_apply_without_a_sink():
    machine = broken_machine()
    with pytest.raises(InvariantViolation, match=r"test\.rule: it broke"):
        machine.apply(ev.AdvanceClock(1))
    assert machine.apply(ev.HostMsr(0, False, 0)).records == (ev.Faulted(13, 0, 0),)


def test_a_sink_turns_a_violation_into_a_finding_and_ends_the_sequence():
    machine = broken_machine()
    machine.sink = OracleSink()
    assert machine.apply(ev.AdvanceClock(1)).records == (ev.Done(),)
    assert [(finding.rule, finding.handler) for finding in machine.sink.findings] == [("test.rule", "advance")]
    assert "ended with a violation" in machine.apply(ev.HostMsr(0, False, 0)).first(ev.Refused).reason
    machine.reset()
    assert not machine.sink.findings
    assert machine.apply(ev.HostMsr(0, False, 0)).first(ev.Refused) is None


def test_a_race_lasts_for_exactly_the_next_step():
    machine = make_machine("sme")
    machine.apply(ev.Race(1, 0x5000, b"!"))
    assert machine.fetches.races
    machine.apply(ev.AdvanceClock(1))
    assert not machine.fetches.races


def test_guests_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="guest 'big': 1073741824 bytes do not fit"):
        make_machine("sme", guests=(GuestConfig(name="big", memory_bytes=1 << 30),), memory_bytes=1 << 30)


def test_options_for_a_plugin_that_is_not_there_are_refused():
    with pytest.raises(ConfigError, match=r"plugin\.smee: no such plugin in this machine; loaded are sme"):
        Machine(MachineConfig(options={"smee": {}}))


def test_a_record_kind_has_one_owner():
    class Twice:
        """A second owner of the stranger's records."""

        REQUIRES = ("stranger",)

        sevlab_records = staticmethod(stranger.sevlab_records)

    with pytest.raises(PluginError, match="record 'stranger.event' is declared twice: by 'stranger' and by plugin 'z'"):
        make_machine(given={"stranger": stranger, "z": Twice()})


def test_a_terabyte_costs_nothing_until_touched():
    machine = make_machine("sme", memory_bytes=1 << 40)
    assert not machine.memory.pages
    machine.access.hypervisor_write((1 << 40) - 1, b"x")
    assert len(machine.memory.pages) == 1


def test_every_kernel_record_is_declared_with_a_role_for_each_field():
    for record in ev.KERNEL_RECORDS:
        assert spec_of(record).fields == tuple(spec_of(record).fields)
        assert len(spec_of(record).fields) == len(record._fields)


def test_schedule_goes_round():
    machine = make_machine("sme", guests=3)
    order = [machine.apply(ev.Schedule()).first(ev.Scheduled).vcpu for _ in range(4)]
    assert order == [1, 2, 0, 1]
