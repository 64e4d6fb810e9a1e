"""What a stranger's package can do, with the plugin given as a module; tests/packaging installs it for real."""

from __future__ import annotations

import pytest
import sevlab_stranger as stranger
from sevlab.core import plugins
from sevlab.core.errors import ConfigError
from sevlab.core.events import (
    AspCommand,
    AspRegisterRead,
    AspRegisterWrite,
    AspStatus,
    CpuExit,
    Faulted,
    HostMsr,
    Refused,
    Resumed,
    SetRegisters,
    Value,
)
from sevlab.core.oracle import OracleSink
from sevlab.core.svm import ExitCode
from sevlab.core.testing import assert_resets, make_machine
from sevlab.plugins.sme import SYSCFG


@pytest.fixture
def machine():
    return make_machine(given={"stranger": stranger}, guests=1)


def add(first, second):
    return AspCommand("stranger", stranger.ADD_COMMAND, 0x8000, stranger.Add.build(first=first, second=second))


def test_its_requirement_is_loaded_before_it(machine):
    assert machine.plugins.names == ("sme", "stranger")


def test_its_event_is_dispatched_and_counts(machine):
    outcome = machine.apply(stranger.Event(stranger.EVENT, 21))
    assert outcome.first(stranger.Answer) == stranger.Answer(42)
    assert machine.apply(HostMsr(stranger.COUNTER_MSR, False, 0)).first(Value) == Value(1)
    assert machine.apply(stranger.Event(1, 0)).first(Refused) == Refused("no event 0x1")


def test_its_exit_handler_serves_a_guest(machine):
    machine.apply(SetRegisters(0, (("rbx", 5), ("rip", 0x100))))
    outcome = machine.apply(CpuExit(0, ExitCode.VMMCALL, 0, 0, b"\x0f\x01\xd9", 0))
    assert outcome.first(Resumed) == Resumed(0, 0x103)
    assert machine.vcpus[0].regs.rax == 10


def test_its_mailbox_command_answers_in_the_buffer(machine):
    status = machine.apply(add(3, 4)).first(AspStatus)
    assert status is not None
    assert (status.status, stranger.Add.from_bytes(status.buffer).total) == (0, 7)


def test_a_rejected_mailbox_command_changes_nothing_but_the_registers(machine):
    machine.apply(add(0xFFFF, 0))
    before = machine.snapshot().memory
    status = machine.apply(add(0xFFFF, 1)).first(AspStatus)
    assert status is not None
    assert status.status == stranger.STATUS_OVERFLOW
    assert stranger.Add.from_bytes(status.buffer).total == 0
    assert machine.apply(AspRegisterRead(0x104)).first(Value) == Value(2)
    assert machine.snapshot().memory != before  # the driver wrote the buffer; the command did not answer in it


def test_the_handshake_by_registers(machine):
    machine.access.hypervisor_write(0x9000, stranger.Add.build(first=1, second=1))
    for offset, value in ((0x104, 0x9000), (0x108, 0), (0x100, stranger.ADD_COMMAND << 16 | 1)):
        machine.apply(AspRegisterWrite(offset, value))
    assert machine.apply(AspRegisterRead(0x100)).first(Value) == Value(1 << 31 | stranger.ADD_COMMAND << 16)
    assert machine.access.hypervisor_read(0x9004, 4) == b"\x02\0\0\0"


def test_it_replaces_a_built_in_handler(machine):
    assert machine.apply(HostMsr(SYSCFG, True, 1 << 23)).first(Faulted) == Faulted(13, 0, 0)
    assert make_machine("sme").apply(HostMsr(SYSCFG, True, 1 << 23)).first(Faulted) is None


def test_its_observer_sees_every_step(machine):
    for _ in range(3):
        machine.apply(HostMsr(0, False, 0))
    assert stranger.state(machine).observed == 3


def test_its_state_resets_and_snapshots(machine):
    assert_resets(machine, stranger.Event(stranger.EVENT, 1), add(1, 2), HostMsr(stranger.COUNTER_MSR, False, 0))


def test_its_options_are_checked():
    machine = make_machine(given={"stranger": stranger}, options={"stranger": {"step": 16}})
    machine.apply(stranger.Event(stranger.EVENT, 0))
    assert stranger.state(machine).counter == 16
    for value, message in ((17, "a number from 1 to 16"), ("x", "not a number"), (True, "not a number")):
        with pytest.raises(ConfigError, match=f"plugin.stranger.step: .*{message}"):
            make_machine(given={"stranger": stranger}, options={"stranger": {"step": value}})
    with pytest.raises(ConfigError, match=r"plugin\.stranger\.wrong: unknown option; expected one of step"):
        make_machine(given={"stranger": stranger}, options={"stranger": {"wrong": 1}})


def test_its_oracle_finds_what_it_looks_for(machine):
    loaded = plugins.load(["stranger"], given={"stranger": stranger})
    (oracle,) = loaded.call("sevlab_oracles")["stranger"]
    machine.sink = OracleSink((oracle,))
    machine.apply(stranger.Event(stranger.EVENT, 0))
    assert machine.sink.findings == []
    stranger.state(machine).counter = 100
    machine.apply(stranger.Event(stranger.EVENT, 0))
    assert [finding.message for finding in machine.sink.sequence_end(machine)] == ["the counter is 101"]


def test_every_hook_is_implemented_by_it():
    loaded = plugins.load(["stranger"], given={"stranger": stranger})
    from sevlab.core import hookspecs

    assert set(loaded.hooks("stranger")) == {name for name in vars(hookspecs) if name.startswith("sevlab_")}
