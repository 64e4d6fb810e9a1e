"""From a guest's file to the place where a campaign begins: boot it, run it there, know its names.

A place is the n-th exit of a kind (`cpuid`, `ioio:40`, `mmio`, `vmgexit:3`, ...), counted from the start or from where
the console shows a text, or an address or symbol.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sevlab.core.config import parse_size
from sevlab.core.cpu import FaultUnwind
from sevlab.core.errors import ConfigError
from sevlab.core.events import CpuExit
from sevlab.core.svm import ExitCode
from sevlab.plugins import io, sev_es
from sevlab.plugins.engines import linux_guest
from sevlab.plugins.engines.block_trace import BlockTrace
from sevlab.plugins.engines.elf_symbols import elf_symbols
from sevlab.plugins.engines.hostile_run import HostileRun
from sevlab.plugins.engines.kallsyms import kernel_symbols
from sevlab.plugins.engines.launch import Feature, boot, c_bit_mask, compose
from sevlab.plugins.engines.loaders.load import kernel_image, load_guest
from sevlab.plugins.engines.snapshot import run_to
from sevlab.plugins.engines.symbols import Symbols
from sevlab.plugins.engines.unicorn_engine import UnicornCpu

if TYPE_CHECKING:
    from sevlab.core.vocabulary import Record
    from sevlab.plugins.engines.execution import Execution

KINDS = {
    "cpuid": ExitCode.CPUID,
    "ioio": ExitCode.IOIO,
    "msr": ExitCode.MSR,
    "mmio": ExitCode.NPF,
    "rdtsc": ExitCode.RDTSC,
    "wbinvd": ExitCode.WBINVD,
    "vmmcall": ExitCode.VMMCALL,
}
VMGEXIT = "vmgexit"
DEFAULT_APPEND = "console=ttyS0 quiet"
FLAT_LOW, FLAT_BYTES = 0x10_0000, 1 << 20


class Start(NamedTuple):
    """Which guest, and where in it; the fields are those of `sevlab fuzz run`."""

    kernel: str
    at: str = "cpuid"
    after: str = ""
    initrd: str = ""
    append: str = ""
    memory: str = "256 MiB"
    strict: bool = False


class Begun(NamedTuple):
    """A guest that stands at the start."""

    run: HostileRun
    trace: BlockTrace
    symbols: Symbols


def begin(start: Start) -> Begun:
    """A guest at its place, ready for inputs. Raises `ConfigError` when it does not get there."""
    run, symbols = launch(start)
    travel(run, symbols, start)
    assert isinstance(run.engine, UnicornCpu)  # `boot` made it
    trace = BlockTrace(run.engine)
    ready(run, trace, symbols, strict=start.strict)
    return Begun(run, trace, symbols)


def launch(start: Start) -> tuple[HostileRun, Symbols]:
    """The guest, launched as an SEV-ES guest, before its first instruction. Raises `ConfigError` or `FormatError`."""
    memory_bytes = parse_size(start.memory, "--memory")
    machine = compose(memory_bytes=memory_bytes)
    image = load_guest(
        Path(start.kernel),
        memory_bytes=memory_bytes,
        initrd=Path(start.initrd) if start.initrd else None,
        append=start.append,
        encrypted=True,
        c_bit_mask=c_bit_mask(machine, Feature.SEV_ES),
        direct=True,
    )
    program = kernel_image(Path(start.kernel))
    symbols = elf_symbols(program) or kernel_symbols(program)
    booted = boot(machine, image, Feature.SEV_ES, make=HostileRun)
    run = booted.execution
    assert isinstance(run, HostileRun)  # made so
    return run, symbols


def travel(run: HostileRun, symbols: Symbols, start: Start) -> None:
    """Run a guest to its place. Raises `ConfigError` when it does not get there."""
    if start.after:
        _run_to_text(run, start.after.encode())
    _run_to_place(run, symbols, start.at)


def ready(run: HostileRun, trace: BlockTrace, symbols: Symbols, *, strict: bool) -> None:
    """From here on inputs are played. Raises `ConfigError` when there is no instruction at RIP."""
    run.symbols = symbols
    linux_guest.prepare(run, symbols)
    trace.trace(symbols.address("_text") or FLAT_LOW, symbols.address("_etext") or FLAT_LOW + FLAT_BYTES)
    rip = run.vcpu.regs.rip
    low, end = symbols.around(rip) or (rip, rip)
    try:
        run.start(trace, (low, max(end, rip + 16)), strict=strict)
    except FaultUnwind as unwind:
        raise ConfigError(f"there is no instruction at {run.name_of(rip)}: {unwind.fault}") from unwind


def _run_to_text(run: Execution, text: bytes) -> None:
    board = io.devices(run.machine, run.vcpu)

    def wanted(_step: Record) -> bool:
        return text in board.uart.output

    if not run_to(run, wanted):
        raise ConfigError(f"--after {text.decode()!r}: {_ended(run)}")


def _run_to_place(run: HostileRun, symbols: Symbols, place: str) -> None:
    kind, _, number = place.partition(":")
    if kind in KINDS or kind == VMGEXIT:
        if number and not number.isdecimal():
            raise ConfigError(f"--at {place}: expected a number behind {kind}:")
        left = int(number or 1)

        def wanted(step: Record) -> bool:
            nonlocal left
            if kind == VMGEXIT:
                left -= isinstance(step, sev_es.Vmgexit)
            else:
                left -= isinstance(step, CpuExit) and step.exit_code == KINDS[kind]
            return left <= 0

        if not run_to(run, wanted):
            raise ConfigError(f"--at {place}: {_ended(run)}, {left} before")
        return
    address = symbols.address(place)
    try:
        address = int(place, 0) if address is None else address
    except ValueError:
        known = ", ".join((*KINDS, VMGEXIT))
        raise ConfigError(f"--at {place}: no symbol of the guest, no address, and none of {known}") from None
    assert isinstance(run.engine, UnicornCpu)  # `boot` made it
    trace = BlockTrace(run.engine)
    trace.stop_in(address, address + 1)
    run.watch = lambda _run: run.end("there") if trace.take_stop() else None
    ended = run.run()
    run.watch = None
    trace.stop_in(0, 0)
    if ended.reason != "there":
        raise ConfigError(f"--at {place}: {_ended(run)} before")
    run.ended = None


def _ended(run: Execution) -> str:
    return f"the guest ended ({run.ended.reason if run.ended is not None else 'it stands'})"
