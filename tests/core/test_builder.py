"""Registries, slots and components: early, precise errors; each slot does what it says."""

from __future__ import annotations

from types import ModuleType

import pytest
from sevlab.core.builder import MmioWindow, Slots
from sevlab.core.dispatch import MAX_RANGE, Registrar, Registry, add_range
from sevlab.core.errors import PluginError
from sevlab.core.events import (
    CpuExit,
    CpuidResult,
    Data,
    Fault,
    Faulted,
    HostCpuid,
    Injected,
    MemoryRead,
    MemoryWrite,
    Party,
    Resumed,
    Schedule,
    Scheduled,
    Space,
    Stopped,
    VmcbWrite,
    VmExit,
)
from sevlab.core.hookspecs import hookimpl
from sevlab.core.machine import Machine
from sevlab.core.state import Stateful
from sevlab.core.svm import EVENT_VALID, EventType, ExitCode, Vector, event
from sevlab.core.testing import make_machine


def plugin(register, requires=()):
    """A plugin object around one registration function."""

    @hookimpl
    def sevlab_register(builder):
        register(builder)

    module = ModuleType("tested", "A test's plugin.")
    module.REQUIRES = requires
    module.sevlab_register = sevlab_register
    return module


def machine_with(register, **settings):
    return make_machine(given={"tested": plugin(register)}, **settings)


def numbers():
    return Registry("exit", hex)


def test_a_key_has_one_owner():
    registry = numbers()
    registry.add(0x72, 1, plugin="first")
    with pytest.raises(PluginError, match="exit 0x72 is registered twice: by plugin 'first' and by plugin 'second'"):
        registry.add(0x72, 2, plugin="second")


def test_a_replacement_gets_the_original_whatever_the_order():
    registry = numbers()
    registry.replace(0x72, lambda original: original + 10, plugin="second")
    registry.add(0x72, 1, plugin="first")
    assert registry.freeze() == {0x72: 11}
    entry = registry.entries()[0x72]
    assert (entry.plugin, entry.replaces) == ("second", "first")


def test_a_second_replacement_is_refused():
    registry = numbers()
    registry.replace(1, lambda original: original, plugin="one")
    with pytest.raises(PluginError, match="replaced twice: by plugin 'one' and by plugin 'two'"):
        registry.replace(1, lambda original: original, plugin="two")


def test_a_replacement_may_stand_over_one_that_it_names():
    registry = numbers()
    registry.add(1, 5, plugin="owner")
    registry.replace(1, lambda original: original * 10, plugin="one")
    registry.replace(1, lambda original: original + 1, plugin="two", over=("one",))
    assert registry.freeze() == {1: 51}
    assert registry.entries()[1].replaces == "one"
    with pytest.raises(PluginError, match="replaced twice: by plugin 'two' and by plugin 'three'"):
        registry.replace(1, lambda original: original, plugin="three", over=("one",))


def test_replacing_nothing_is_refused_at_freeze():
    registry = numbers()
    registry.replace(1, lambda original: original, plugin="one")
    with pytest.raises(PluginError, match="plugin 'one' replaces exit 0x1, which nobody handles"):
        registry.freeze()


def test_a_replacement_may_stand_alone_where_it_says_on_what():
    registry = numbers()
    registry.replace(1, lambda original: original + 10, plugin="one", absent=5)
    assert registry.freeze() == {1: 15}
    registry.add(1, 1, plugin="two")
    assert registry.freeze() == {1: 11}


def test_a_range_is_spelled_out_and_bounded():
    registry = numbers()
    add_range(Registrar(registry, "p"), 0x10, 0x12, "handler")
    assert sorted(registry.freeze()) == [0x10, 0x11, 0x12]
    add_range(Registrar(registry, "p"), 0x20000, 0x20000 + MAX_RANGE - 1, "handler")
    for first, last in ((5, 4), (0, MAX_RANGE)):
        with pytest.raises(PluginError, match="expected 1 to 65536 keys"):
            add_range(Registrar(registry, "p"), first, last, "handler")


def test_windows_may_touch_but_not_overlap():
    window = MmioWindow(0x1000, 0x100, lambda *_: 0, lambda *_: None)
    machine_with(lambda builder: (builder.mmio(window), builder.mmio(window._replace(gpa=0x1100))))
    with pytest.raises(PluginError, match=r"MMIO windows overlap: 0x1000 of plugin 'tested' reaches 0x10ff"):
        machine_with(lambda builder: (builder.mmio(window), builder.mmio(window._replace(gpa=0x10FF))))
    with pytest.raises(PluginError, match="expected a positive length"):
        machine_with(lambda builder: builder.mmio(window._replace(length_bytes=0)))


def test_shared_cpuid_leaves_are_ored():
    machine = machine_with(
        lambda builder: (builder.cpuid_bits(0x8000_001F, eax=1, ebx=51), builder.cpuid_bits(0x8000_001F, eax=2))
    )
    assert machine.apply(HostCpuid(0x8000_001F, 0)).first(CpuidResult) == CpuidResult(3, 51, 0, 0)
    with pytest.raises(PluginError, match="no register rax"):
        machine_with(lambda builder: builder.cpuid_bits(1, rax=1))


def test_a_component_has_one_owner():
    with pytest.raises(PluginError, match="component 'tested' belongs to plugin 'tested'"):
        machine_with(lambda builder: (builder.component(Stateful()), builder.component(Stateful())))


# Slots ------------------------------------------------------------------------------------------------------------


def test_an_unknown_slot_is_refused():
    with pytest.raises(PluginError, match="no slot 'vmrun_entr'; there are access_check"):
        machine_with(lambda builder: builder.slot("vmrun_entr", print))


@pytest.mark.parametrize("name", Slots.__slots__)
def test_each_slot_has_one_owner(name):
    assert getattr(make_machine().slots, name) is None
    first, second = (plugin(lambda builder: builder.slot(name, lambda *_: None)) for _ in range(2))
    with pytest.raises(PluginError, match=f"slot '{name}' has two owners: plugin 'a' and plugin 'b'"):
        Machine(make_machine().config, given={"a": first, "b": second})


def test_a_slot_is_taken_over_from_its_owner_and_only_from_one():
    below = plugin(lambda builder: builder.slot("clock", lambda _machine: 5))
    above = plugin(lambda builder: builder.replace_slot("clock", lambda clock: lambda machine: clock(machine) + 1))
    above.REQUIRES = ("a",)
    assert make_machine(given={"a": below, "b": above}).tsc() == 6
    with pytest.raises(PluginError, match="plugin 'tested' replaces slot 'clock', which nobody owns"):
        machine_with(lambda builder: builder.replace_slot("clock", lambda clock: clock))
    with pytest.raises(PluginError, match="replaces slot 'clok', which nobody owns"):
        machine_with(lambda builder: builder.replace_slot("clok", lambda clock: clock))


def test_slot_access_check_refuses_an_access():
    seen = []

    def check(actor, spa, gpa, kind):
        seen.append((spa, gpa))
        return Fault(Vector.PF, 1 << 31, 0x5000) if spa == 0x5000 else None

    machine = machine_with(lambda builder: builder.slot("access_check", check))
    refused = machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, 0x4FFF, False, b"ab"))
    assert refused.first(Faulted) == Faulted(Vector.PF, 1 << 31, 0x5000)
    assert machine.apply(MemoryRead(Party.DMA, 0, Space.SPA, 0x4FFF, False, 1)).first(Data) == Data(b"\0")
    assert (0x4FFF, -1) in seen


def test_slot_key_of_chooses_the_key():
    keys = {}

    def register(builder):
        builder.at_boot(lambda machine: keys.update(k=machine.memory.install_key(bytes(range(32)), "k")))
        builder.slot("key_of", lambda asid, c_bit: keys.get("k") if c_bit else None)

    machine = machine_with(register)
    machine.apply(MemoryWrite(Party.HYPERVISOR, 0, Space.SPA, 0x5000, True, b"secret"))
    assert machine.apply(MemoryRead(Party.HYPERVISOR, 0, Space.SPA, 0x5000, True, 6)).first(Data) == Data(b"secret")
    assert machine.memory.dram(0x5000, 6) != b"secret"


def test_slot_vmrun_enter_refuses_an_entry():
    machine = machine_with(lambda builder: builder.slot("vmrun_enter", lambda *_: ExitCode.BUSY), guests=1)
    outcome = machine.apply(Schedule())
    assert outcome.first(VmExit).exit_code == ExitCode.BUSY
    assert outcome.first(Stopped) == Stopped(0, "VMRUN failed with BUSY")


def test_slot_vmrun_exit_hides_or_swallows_an_exit():
    def hide(_machine, _vcpu, exit_):
        return None if exit_.exit_code == ExitCode.CPUID else exit_._replace(exit_info_1=0)

    def register(builder):
        builder.slot("vmrun_exit", hide)
        builder.exits.add(ExitCode.HLT, lambda *_: None)
        builder.at_boot(lambda machine: machine.vcpus[0].vmcb.intercept(ExitCode.HLT, ExitCode.CPUID))

    machine = machine_with(register, guests=1)
    assert machine.apply(CpuExit(0, ExitCode.CPUID, 0, 0, b"", 0)).records == ()
    shown = machine.apply(CpuExit(0, ExitCode.HLT, 7, 8, b"", 0)).first(VmExit)
    assert shown == VmExit(0, ExitCode.HLT, 0, 8)


def test_slot_page_owner_changed_is_told():
    told = []
    machine = machine_with(lambda builder: builder.slot("page_owner_changed", lambda *what: told.append(what)))
    key = machine.memory.install_key(bytes(range(32)), "k")
    machine.memory.write(0x5000, b"x", key, 1)
    assert told == [(5, None, key)]


def test_slot_inject_filter_changes_the_event():
    wanted = event(14, EventType.EXCEPTION, 0)
    allowed = event(28, EventType.EXCEPTION)
    machine = machine_with(lambda builder: builder.slot("inject_filter", lambda *_: allowed), guests=1)
    machine.apply(VmcbWrite(0, 0xA8, wanted.to_bytes(8, "little")))
    assert machine.apply(Schedule()).first(Injected) == Injected(0, allowed)
    blocked = machine_with(lambda builder: builder.slot("inject_filter", lambda *_: 0), guests=1)
    blocked.apply(VmcbWrite(0, 0xA8, wanted.to_bytes(8, "little")))
    outcome = blocked.apply(Schedule())
    assert outcome.first(Injected) is None
    assert outcome.first(Resumed) is not None
    assert wanted & EVENT_VALID


def test_slot_cpuid_filter_has_the_last_word():
    def filtered(_machine, _vcpu, leaf, _subleaf, registers):
        return (leaf, *registers[1:])

    machine = machine_with(lambda builder: (builder.cpuid_bits(7, ebx=5), builder.slot("cpuid_filter", filtered)))
    assert machine.cpuid(None, 7, 0) == (7, 5, 0, 0)


def test_slot_clock_gives_the_time():
    machine = machine_with(lambda builder: builder.slot("clock", lambda machine: machine.clock.tsc + 1000))
    assert machine.tsc() == 1000
    assert make_machine().tsc() == 0


def test_slot_scheduler_chooses_the_vcpu():
    machine = machine_with(lambda builder: builder.slot("scheduler", lambda _, runnable: runnable[-1]), guests=3)
    assert machine.apply(Schedule()).first(Scheduled) == Scheduled(2)
