"""Record what is done to a machine, so that it can be done again.

A `Recorder` takes the place of the machine's `apply`, `reset`, `restore` and `mark`, and writes each with its outcome.
State that comes from elsewhere - a test that sets a register in Python, a guest created by hand - is noticed by
comparing snapshots between steps, and goes into the trace as a record of its own. So a recording replays whatever
was done, as long as the machine is composed of what its configuration says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from sevlab.core.determinism import TSC_HZ
from sevlab.core.errors import InvariantViolation, TraceFormatError
from sevlab.core.events import Party
from sevlab.core.machine import Machine, Snapshot
from sevlab.core.units import MASK64
from sevlab.core.vocabulary import Outcome, Record
from sevlab.traces.machine_state import pack_pages, pack_snapshot
from sevlab.traces.records import End, Found, Mark, Pages, Reset, State, Unwritable, Violation
from sevlab.traces.schema import NO_VCPU, Entry, Header, PluginVersion
from sevlab.traces.writer import TraceWriter

PAGES_IN_STATE = 1024
"""More are written in records of so many: a block of a trace has a limit."""
REPLACED = ("apply", "reset", "restore", "mark")


def header_of(machine: Machine) -> Header:
    """The header of a recording of `machine`."""
    return Header(
        config=machine.config,
        plugins=tuple(PluginVersion(plugin.name, plugin.version) for plugin in machine.plugins.plugins),
        oracles=None if machine.sink is None else tuple(oracle.name for oracle in machine.sink.oracles),
    )


def vcpu_of(step: Record) -> int:
    """The vCPU that takes a step; an access of another party than the guest is no vCPU's, whatever its field says."""
    vcpu = getattr(step, "vcpu", NO_VCPU)
    return vcpu if isinstance(vcpu, int) and getattr(step, "party", Party.GUEST) == Party.GUEST else NO_VCPU


class Recorder:
    """Records `machine` into `target` (a path or a binary file) from now on, until `close`.

    The trace is begun with the first step, so that a sink may still be attached. `booted` is the snapshot of the
    machine as composed, where the caller has it; else another one is composed. With `watch` off nobody compares
    snapshots: faster, and right when the machine is as composed and driven by steps alone.
    """

    def __init__(
        self,
        machine: Machine,
        target: str | Path | BinaryIO,
        *,
        overwrite: bool = False,
        booted: Snapshot | None = None,
        watch: bool = True,
    ) -> None:
        self.machine = machine
        self._booted = booted
        self._target = target
        self._overwrite = overwrite
        self._watch = watch
        self._writer: TraceWriter | None = None
        self._plain: dict[str, Callable[..., Any]] = {name: getattr(machine, name) for name in REPLACED}
        self._known: Snapshot | None = None
        self._marked: Snapshot | None = None
        self._inside = False
        for name in REPLACED:
            setattr(machine, name, getattr(self, name))

    # In the machine's place -------------------------------------------------------------------------------------

    def apply(self, step: Record) -> Outcome:
        """Apply a step and record it with its outcome, with the findings, and with the exception that it ends in."""
        if self._inside:  # a handler that applies a step: part of the outer one
            return self._plain["apply"](step)  # type: ignore[no-any-return]
        self._look()
        sink = self.machine.sink
        before = 0 if sink is None else len(sink.findings)
        self._inside = True
        try:
            outcome: Outcome = self._plain["apply"](step)
        except Exception as error:
            rule = error.rule if isinstance(error, InvariantViolation) else type(error).__name__
            self._write(step, (Violation(rule, str(error)),))
            raise
        finally:
            self._inside = False
        findings = () if sink is None else tuple(Found(*finding) for finding in sink.findings[before:])
        self._write(step, outcome.records + findings)
        return outcome

    def reset(self) -> None:
        """Reset and record it."""
        self._begin()
        self._plain["reset"]()
        now = self._snapshot()
        if now == self._marked:
            self._write(Reset())
        else:  # the mark is older than the recording
            self._write_state(now)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore and record the state."""
        self._begin()
        self._plain["restore"](snapshot)
        self._write_state(self._snapshot())

    def mark(self) -> None:
        """Mark and record it."""
        self._look()
        self._plain["mark"]()
        self._marked = self._snapshot()
        self._write(Mark())

    def settle(self) -> None:
        """Record the state as it is now; from here on only steps are recorded, and nobody compares snapshots.

        For a machine whose memory changes between steps because a guest executes: what the steps depend on is in them.
        """
        self._look()
        self._watch = False

    def end(self) -> None:
        """Let the oracles look at the sequence and record what they find."""
        sink = self.machine.sink
        if sink is not None:
            self._look()
            before = len(sink.findings)
            findings = sink.sequence_end(self.machine)[before:]
            self._write(End(), tuple(Found(*finding) for finding in findings))

    @property
    def entries(self) -> int:
        """How many entries are recorded."""
        return 0 if self._writer is None else self._writer.entries

    # The trace --------------------------------------------------------------------------------------------------

    def _begin(self) -> TraceWriter:
        """The writer; the first call opens it and records a state that composing alone does not give."""
        if self._writer is None:
            machine = self.machine
            self._writer = TraceWriter(
                self._target, header_of(machine), vocabulary=machine.vocabulary, overwrite=self._overwrite
            )
            if self._watch:
                booted = self._booted or Machine(machine.config, plugins=machine.plugins).snapshot()
                self._known = self._marked = booted
        return self._writer

    def _snapshot(self) -> Snapshot | None:
        return self.machine.snapshot() if self._watch else None

    def _look(self) -> None:
        """Record the state of the machine when it is not what the last step left."""
        self._begin()
        if self._watch and (now := self.machine.snapshot()) != self._known:
            self._write_state(now)

    def _write_state(self, snapshot: Snapshot | None) -> None:
        """The state, and in records of their own the pages that it has besides when they are many."""
        whole = snapshot or self.machine.snapshot()
        pages = whole.memory.pages
        many = len(pages) > PAGES_IN_STATE
        head = whole._replace(memory=whole.memory._replace(pages=())) if many else whole
        try:
            state: Record = State(pack_snapshot(head, self._known))
        except TraceFormatError as error:  # what follows will replay from another state, and say so
            state = Unwritable(str(error))
        self._write(state)
        for start in range(0, len(pages) if many else 0, PAGES_IN_STATE):
            part = Pages(pack_pages(pages[start : start + PAGES_IN_STATE]))
            self._begin().append(Entry(self._time_ns(), NO_VCPU, part, ()))

    def _write(self, step: Record, outcome: tuple[Record, ...] = ()) -> None:
        time_ns = self._time_ns()
        writer = self._begin()
        try:
            writer.append(Entry(time_ns, vcpu_of(step), step, outcome))
        except TraceFormatError as error:
            writer.append(Entry(time_ns, NO_VCPU, Unwritable(str(error)), ()))
        else:
            self._known = self._snapshot()

    def _time_ns(self) -> int:
        return self.machine.clock.tsc * 1_000_000_000 // TSC_HZ & MASK64

    def close(self) -> None:
        """Stop recording and close the trace; the machine is as it was, a machine without a step leaves no file."""
        for name in REPLACED:
            self.machine.__dict__.pop(name, None)
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@contextmanager
def recording(folder: Path) -> Iterator[list[Path]]:
    """Record every machine that is composed inside, each in a file of `folder`; gives the list of the files.

    This is how a test run or a demo chapter is recorded, whose machines are made out of sight. Files of an earlier
    recording in `folder` are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    recorders: dict[Path, Recorder] = {}
    compose = Machine.__init__

    def overheard(self: Machine, *args: Any, **kwargs: Any) -> None:
        compose(self, *args, **kwargs)
        path = folder / f"machine-{len(recorders) + 1}.sevtrace"
        recorders[path] = Recorder(self, path, overwrite=True, booted=self.snapshot())

    Machine.__init__ = overheard  # type: ignore[method-assign]  # machines are made by whoever is recorded
    try:
        yield paths
    finally:
        Machine.__init__ = compose  # type: ignore[method-assign]
        for path, recorder in recorders.items():
            recorder.close()
            if recorder.entries:
                paths.append(path)
