"""The target, the counters and the oracles, run on step sequences; no step raises, whatever it holds."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sevlab.core.events import AdvanceClock, MemoryWrite, Party, Race, SetRegisters, Space
from sevlab.core.oracle import OracleSink
from sevlab.core.plugins import load
from sevlab.core.testing import assert_resets, step_strategy
from sevlab.plugins.xen import ABI_FLAG, BackendEvent, ConsoleInput, Errno, HypercallStep, Nr, XenstoreRequest, xen
from sevlab.plugins.xen.fuzzing import COUNTERS, ORACLES, TARGETS
from sevlab.plugins.xen.numbers import Evtchnop, MapSpace
from sevlab.plugins.xen.state import ActiveGrant, ChannelState, EventChannel

from tests.plugins.xen.world import BOUNCE, PAGE, call, guest_of, machine_of, registers_of, vmmcall

BY_NAME = {oracle.name: oracle for oracle in ORACLES}


def test_the_hooks_bring_them():
    plugins = load(["io", "xen"])
    assert plugins.call_one("xen", "sevlab_targets") == TARGETS
    assert plugins.call_one("xen", "sevlab_oracles") == ORACLES
    assert plugins.call_one("xen", "sevlab_state_counters") == COUNTERS


def test_the_target_names_steps_oracles_and_plugins_that_exist():
    machine = machine_of()
    for target in TARGETS:
        assert set(target.steps) <= set(machine.vocabulary.kinds)
        assert set(target.oracles) <= set(BY_NAME)
        assert set(target.plugins) <= set(machine.plugins.names)


def test_counters_are_short_and_change_with_state():
    machine = machine_of()
    before = {counter.machine: counter.read(machine) for counter in COUNTERS}
    guest = guest_of(machine)
    guest.invoke(Nr.EVENT_CHANNEL_OP, Evtchnop.BIND_IPI, vcpu=0)
    guest.map_page(MapSpace.GRANT_TABLE, 3, PAGE)
    call(machine, Nr.SET_TIMER_OP, 10**9)
    after = {counter.machine: counter.read(machine) for counter in COUNTERS}
    assert {name for name in before if before[name] != after[name]} == set(before)
    assert all(isinstance(word, str) and len(word) < 16 for words in after.values() for word in words)


# Each oracle on a machine that was broken on purpose ----------------------------------------------------------------


def findings(machine, oracle, step):
    machine.sink = OracleSink((BY_NAME[oracle],))
    machine.apply(step)
    return [finding.rule for finding in machine.sink.findings]


STEP = HypercallStep(0, Nr.XEN_VERSION, 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("oracle", BY_NAME)
def test_a_good_machine_has_no_findings(oracle):
    machine = machine_of()
    assert findings(machine, oracle, STEP) == []
    assert BY_NAME[oracle].sequence_end(machine) == ()


def test_a_connection_that_points_nowhere_is_found():
    machine = machine_of()
    xen(machine).domains[1].channels[5] = EventChannel(
        port=5, state=ChannelState.INTERDOMAIN, remote_domid=2, remote_port=9
    )
    assert findings(machine, "xen.channels", STEP) == ["inconsistent"]


def test_a_use_that_nobody_has_is_found():
    machine = machine_of()
    xen(machine).domains[1].grants.active[8] = ActiveGrant(domid=2, readers=1)
    assert findings(machine, "xen.grants", STEP) == ["count"]


def machine_with(make, number=Nr.XEN_VERSION, **options):
    from sevlab.core.hookspecs import hookimpl
    from sevlab.core.testing import make_machine

    class Broken:
        """A hypercall that was replaced."""

        @hookimpl
        def sevlab_register(self, builder):
            builder.hypercalls.replace(number, lambda entry: entry._replace(run=make(entry.run)))

    return make_machine("io", "xen", given={"broken": Broken()}, guests=1, options={"xen": options})


def test_upper_halves_that_reach_the_guest_are_found():
    def make(run):
        def handler(call):
            call.frame.registers.rbx |= 1 << 40
            return run(call)

        return handler

    machine = machine_with(make, start="protected")
    assert findings(machine, "xen.register-clip", STEP) == ["wide"]


def test_a_continuation_to_another_call_or_without_progress_is_found():
    def other(run):
        return lambda call: call.continue_(Nr.SCHED_OP, 0, 0)

    assert findings(machine_with(other, start="long"), "xen.continuation", STEP) == ["number"]

    def stuck(run):
        return lambda call: call.continue_(Nr.MEMORY_OP, call.args[0], call.args[1])

    machine = machine_with(stuck, Nr.MEMORY_OP, start="long")
    step = HypercallStep(0, Nr.MEMORY_OP, 1, 0, 0, 0, 0, 0, 0)
    assert findings(machine, "xen.continuation", step) == ["progress"]


UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)
"""Examples here make machines: a failure is reported as it was found, since shrinking it would take minutes."""


# Any input --------------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(0, 70),
    st.sampled_from((BOUNCE, PAGE, 0x7FF0, 1 << 31, 1 << 32, (1 << 64) - 1, (16 << 20) - 8)),
    st.integers(0, (1 << 64) - 1),
)
calls = st.builds(
    lambda number, flag, args: HypercallStep(0, number | flag, *args),
    st.one_of(st.sampled_from([int(nr) for nr in Nr]), numbers),
    st.sampled_from((0, ABI_FLAG)),
    st.tuples(*[numbers] * 7),
)
buffers = st.builds(
    lambda gpa, words: MemoryWrite(
        Party.GUEST, 0, Space.GPA, gpa, False, b"".join(word.to_bytes(8, "little") for word in words)
    ),
    st.sampled_from((BOUNCE, PAGE)),
    st.lists(numbers, max_size=8),
)
others = st.one_of(
    st.builds(
        BackendEvent,
        st.integers(0, 3),
        st.sampled_from(("virq", "gsi", "pirq", "x")),
        st.integers(0, 30),
        st.integers(0, 2),
    ),
    st.builds(ConsoleInput, st.integers(0, 3), st.binary(max_size=20)),
    st.builds(XenstoreRequest, st.integers(0, 30), st.binary(max_size=20), st.integers(0, 3)),
    st.builds(AdvanceClock, st.integers(0, 1 << 40)),
    st.builds(Race, st.integers(1, 4), st.integers(0, 1 << 26), st.binary(max_size=8)),
)


@pytest.mark.slow
@pytest.mark.parametrize("abi", ["none", "physical", "fast"])
@pytest.mark.parametrize("start", ["long", "protected", "reset"])
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=UNSHRUNK)
@given(steps=st.lists(st.one_of(calls, calls, buffers, others), max_size=12))
def test_no_sequence_raises_or_upsets_an_oracle(abi, start, steps):
    machine = machine_of(abi=abi, start=start, viridian=abi == "physical", memory_bytes=16 << 20, preempt_after=3)
    machine.sink = OracleSink(ORACLES)
    for step in steps:
        machine.apply(step)
    assert not machine.sink.sequence_end(machine)
    for counter in COUNTERS:
        counter.read(machine)


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), phases=UNSHRUNK)
@given(data=st.data())
def test_no_step_of_the_vocabulary_raises(data):
    machine = machine_of(abi="physical")
    for step in data.draw(st.lists(step_strategy(machine.vocabulary), max_size=15)):
        machine.apply(step)


@cache
def small_machine():
    return machine_of(guests=2, memory_bytes=1 << 20, start="protected")


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), phases=UNSHRUNK)
@given(
    number=st.sampled_from([int(nr) for nr in Nr]),
    command=st.integers(0, 30),
    words=st.lists(numbers, min_size=8, max_size=8),
)
def test_an_error_changes_nothing(number, command, words):
    """Any number, any operation, any structure: when the answer is an error, domains and memory are as before."""
    machine = small_machine()
    machine.reset()
    guest_of(machine).write(BOUNCE, b"".join(word.to_bytes(8, "little") for word in words))
    registers_of(machine, rax=number, rbx=command, rcx=BOUNCE, rdx=BOUNCE if number == Nr.VCPU_OP else 1, rsi=0, rdi=0)
    if number == Nr.VCPU_OP:
        registers_of(machine, rcx=0)
    before = machine.snapshot()
    vmmcall(machine)
    if machine.vcpus[0].regs.rax not in {-error & 0xFFFF_FFFF for error in Errno}:
        return
    if (number, command) in KEEPS:
        return
    after = machine.snapshot()
    assert after.memory == before.memory
    assert dict(after.state.values)["components"] == dict(before.state.values)["components"]


KEEPS = {(Nr.MULTICALL, command) for command in range(31)} | {
    (Nr.GRANT_TABLE_OP, 8),
    (Nr.PHYSDEV_OP, 13),
    (Nr.HVM_OP, 0),
}
"""Those that write although they fail, as Xen's do: results before an entry that cannot be read, the version that a
table has, the PIRQ that was asked for; and a TSS that crashes its domain."""


def test_sequences_reset():
    machine = machine_of()
    guest_of(machine).write(BOUNCE, (0x7FF0 | 0x7FF0 << 16).to_bytes(8, "little"))
    machine.mark()
    assert_resets(
        machine,
        HypercallStep(0, Nr.EVENT_CHANNEL_OP, Evtchnop.ALLOC_UNBOUND, BOUNCE, 0, 0, 0, 0, 0),
        HypercallStep(0, Nr.SET_TIMER_OP, 5, 0, 0, 0, 0, 0, 0),
        AdvanceClock(100),
        SetRegisters(0, (("rax", 1),)),
    )
