"""A stranger's plugin: every kind of registration and every hook, through public names alone."""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple, cast

from sevlab.core.asp import AspCommandEntry, Command, MailboxInterface
from sevlab.core.builder import Msr, PluginBuilder, Port
from sevlab.core.cliapi import Capability, CommandSpec, DemoChapter
from sevlab.core.config import Option
from sevlab.core.cpu import Vcpu, skip_instruction, visible_registers
from sevlab.core.events import CpuExit, Done, Fault, Party, Refused, Value
from sevlab.core.hookspecs import hookimpl
from sevlab.core.layout import Layout, u16, u32
from sevlab.core.machine import Machine
from sevlab.core.oracle import Canary, Finding, StateCounter, Target
from sevlab.core.payload import Message, Payload
from sevlab.core.porting import Judgement, Path, Porting
from sevlab.core.state import Stateful
from sevlab.core.statemachine import StateMachine
from sevlab.core.svm import ExitCode
from sevlab.core.vocabulary import Boundary, Checked, Input, Outcome, Record, outcome, step
from sevlab.plugins.sme import SYSCFG

REQUIRES = ("sme",)

EVENT = 0x8000_F000
COUNTER_MSR = 0xC001_1FE0
ADD_COMMAND = 0x7F
STATUS_OVERFLOW = 0x16


class Add(Layout, size=8):
    """Command buffer of ADD."""

    first = u16(0, source="this test")
    second = u16(2, source="this test")
    total = u32(4, source="this test")


class Phase(Enum):
    QUIET = 0
    BUSY = 1


class Signal(Enum):
    START = 0
    STOP = 1


PHASES = StateMachine(
    name="stranger.phase",
    initial=Phase.QUIET,
    reject=0xFF,
    table={Phase.QUIET: {Signal.START: Phase.BUSY}, Phase.BUSY: {Signal.STOP: Phase.QUIET}},
)


class StrangerState(Stateful):
    """What the plugin remembers."""

    counter: int = 0
    phase: Phase = Phase.QUIET
    observed: int = 0
    last_port_write: int = 0


def state(machine: Machine) -> StrangerState:
    return cast("StrangerState", machine.components["stranger"])


@step("stranger.event", Boundary.GHCB)
class Event(NamedTuple):
    """An NAE-like request with one argument."""

    code: Input[int]
    argument: Input[int]


@outcome("stranger.answer", Boundary.GHCB)
class Answer(NamedTuple):
    """What the event gave."""

    value: Checked[int]


@hookimpl
def sevlab_options() -> tuple[Option, ...]:
    return (Option(name="step", default=1, low=1, high=16, doc="how far the counter moves"),)


@hookimpl
def sevlab_records() -> tuple[type, ...]:
    return (Event, Answer)


@hookimpl
def sevlab_layouts() -> tuple[type[Layout], ...]:
    return (Add,)


@hookimpl
def sevlab_state_machines() -> tuple[StateMachine[Any, Any, Any], ...]:
    return (PHASES,)


@hookimpl
def sevlab_register(builder: PluginBuilder) -> None:
    increment = int(builder.options["step"])

    def doubled(machine: Machine, argument: int) -> int:
        state(machine).counter += increment
        return argument * 2

    def vmmcall(machine: Machine, vcpu: Vcpu, exit_: CpuExit) -> None:
        registers = visible_registers(machine, vcpu)
        registers.rax = machine.tables.nae_events[EVENT](machine, registers.rbx)
        skip_instruction(vcpu, exit_)

    def intercept(machine: Machine) -> None:
        for vcpu in machine.vcpus.values():
            vcpu.vmcb.intercept(ExitCode.VMMCALL)

    def observed(machine: Machine, _step: Record, _outcome: Outcome) -> None:
        state(machine).observed += 1

    builder.component(StrangerState())
    builder.nae_events.add(EVENT, doubled)
    builder.steps.add(Event, event_step)
    builder.exits.add(ExitCode.VMMCALL, vmmcall)
    builder.at_boot(intercept)
    builder.guest_msrs.add(COUNTER_MSR, Msr(read_counter, None))
    builder.host_msrs.add(COUNTER_MSR, Msr(read_counter, None))
    builder.ports.add(0x80, Port(read_port, write_port))
    builder.mailbox(MailboxInterface("stranger", 0x100, 0x104, 0x108, 0xFF, 0x11, 0x09, 1 << 4))
    builder.asp_commands.add(("stranger", ADD_COMMAND), AspCommandEntry("ADD", Add.SIZE, add))
    builder.host_msrs.replace(SYSCFG, lambda original: Msr(original.read, refuse_write))
    builder.observe(observed)


def event_step(machine: Machine, event: Event) -> None:
    handler = machine.tables.nae_events.get(event.code)
    if handler is None:
        machine.emit(Refused(f"no event {event.code:#x}"))
    else:
        machine.emit(Answer(handler(machine, event.argument)))


def read_counter(machine: Machine, _vcpu: Vcpu | None, _msr: int) -> int:
    return state(machine).counter


def refuse_write(_machine: Machine, _vcpu: Vcpu | None, _msr: int, _value: int) -> Fault | None:
    return Fault(13, 0, 0)


def read_port(machine: Machine, _vcpu: Vcpu, _port: int, _width: int) -> int:
    return state(machine).last_port_write


def write_port(machine: Machine, _vcpu: Vcpu, _port: int, _width: int, value: int) -> None:
    state(machine).last_port_write = value


def add(_machine: Machine, command: Command) -> int:
    buffer = Add.from_bytes(command.buffer)
    if buffer.first + buffer.second > 0xFFFF:
        command.error_stack = 0x1_0000_0002
        return STATUS_OVERFLOW
    command.reply = buffer.replace(total=buffer.first + buffer.second).to_bytes()
    return 0


class CounterOracle:
    """The counter stays small."""

    name = "stranger.counter"
    documentation = "The counter never passes 100. Source: this test."

    def step_end(self, machine: Machine, _step: Record, _outcome: Outcome) -> tuple[Finding, ...]:
        if state(machine).counter > 100:
            return (Finding(self.name, "counter", f"the counter is {state(machine).counter}"),)
        return ()

    def sequence_end(self, _machine: Machine) -> tuple[Finding, ...]:
        return ()


@hookimpl
def sevlab_oracles() -> tuple[CounterOracle, ...]:
    return (CounterOracle(),)


@hookimpl
def sevlab_targets() -> tuple[Target, ...]:
    return (Target("stranger", Party.GUEST, ("stranger.event",), ("stranger.counter",), ("stranger",), "Its events."),)


@hookimpl
def sevlab_canaries() -> tuple[Canary, ...]:
    return (Canary("X01 example", "An example of a canary.", "stranger.counter"),)


@hookimpl
def sevlab_state_counters() -> tuple[StateCounter, ...]:
    return (StateCounter("stranger.phase", lambda machine: (state(machine).phase.name,)),)


@hookimpl
def sevlab_porting() -> tuple[Porting, ...]:
    return (Porting("stranger", lambda exit_, is_device: Judgement(Path.STAYS, "everything")),)


@hookimpl
def sevlab_payloads() -> tuple[Payload, ...]:
    add = Message(ADD_COMMAND, "ADD", Add, {"interface": "stranger", "command": ADD_COMMAND}, needs=("first", "second"))
    return (Payload("asp.command", "buffer", _message_of, (add,), answer=("asp-status", "buffer")),)


def _message_of(record: Record) -> int | None:
    return ADD_COMMAND if getattr(record, "interface", "") == "stranger" else None


@hookimpl
def sevlab_commands() -> tuple[CommandSpec, ...]:
    return (CommandSpec("greet", "Say hello", "sevlab_stranger.cli:greet"),)


@hookimpl
def sevlab_demo_chapters() -> tuple[DemoChapter, ...]:
    return (DemoChapter("stranger", "A stranger's chapter", 900, "sevlab_stranger.cli:chapter"),)


@hookimpl
def sevlab_capabilities() -> tuple[Capability, ...]:
    return (Capability("stranger's tool", "nothing", lambda: "1.0"),)


__all__ = ["ADD_COMMAND", "COUNTER_MSR", "EVENT", "Add", "Answer", "Done", "Event", "Value"]
