"""`sevlab run`: a real kernel or program as a guest, its console on the terminal, a summary at the end."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from sevlab.core.cli import echo_json
from sevlab.core.cliapi import resolve
from sevlab.core.determinism import TSC_HZ
from sevlab.core.errors import ConfigError
from sevlab.core.svm import ExitCode, exit_name
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins import io
from sevlab.plugins.engines.commands.options import FILE, GuestChoice, choice, guest_options
from sevlab.plugins.engines.kallsyms import kernel_symbols
from sevlab.plugins.engines.launch import Booted, Feature, Paging, boot, c_bit_mask, compose
from sevlab.plugins.engines.loaders.load import kernel_image
from sevlab.plugins.engines.report import crash_report
from sevlab.plugins.engines.symbols import Symbols, read_symbols

if TYPE_CHECKING:
    from sevlab.plugins.engines.execution import Execution

RECORDER = "sevlab.traces.record:Recorder"
"""Named, not imported: recordings are the other half of the house."""
XEN_GUEST = "sevlab.plugins.xen_guest.watch:XenGuestWatch"
"""Likewise: this plugin does not need Xen's."""
XEN_PAGES = 4
"""The last pages of a Xen guest's memory, which are not its own to use: xenstore, console, and two spare ones."""


@click.command(name="run")
@guest_options
@click.option("--record", type=click.Path(dir_okay=False, path_type=Path), help="Record the run as a trace.")
@click.option("--seed", default="0", show_default=True, help="Of keys and of the guest's RDRAND.")
@click.option("--xen", is_flag=True, help="As an HVM guest of Xen: what it asks of Xen, and where.")
@click.option("--adapt", is_flag=True, help="With --xen, encrypted: do what the kernel lacks, say it, and go on.")
@click.option("--symbols", type=FILE, help="With --xen: its System.map; else its own kallsyms.")
@click.option("--max-instructions", type=click.IntRange(min=1), help="End the run after about so many.")
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON; the console goes to standard error.")
def run(
    *,
    record: Path | None,
    seed: str,
    xen: bool,
    adapt: bool,
    symbols: Path | None,
    max_instructions: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Execute KERNEL as a guest: a Linux bzImage or vmlinux, another x86-64 ELF, or a flat binary for 1 MiB."""
    chosen = choice(options)
    if record is not None and chosen.feature is not Feature.SEV_ES:
        raise ConfigError(
            "--record: only of --feature sev-es; of others the hypervisor reads memory that no step holds"
        )
    if xen:
        _check_xen(chosen, adapt=adapt, recorded=record is not None)
    elif adapt or symbols:
        raise ConfigError("--adapt and --symbols: only with --xen")
    machine = compose(
        memory_bytes=chosen.memory_bytes,
        seed=seed.encode(),
        paging=chosen.paging,
        plugins=("xen", "xen_guest") if xen else (),
        options={"xen": {"adapt": adapt}} if xen else {},
    )
    image = chosen.image(c_bit_mask(machine, chosen.feature), reserved_bytes=XEN_PAGES * PAGE_BYTES if xen else 0)
    recorder: Any = None

    def start_recording() -> None:
        nonlocal recorder
        recorder = resolve(RECORDER)(machine, record)
        recorder.settle()

    try:
        begin = None if record is None else start_recording
        booted = boot(machine, image, chosen.feature, paging=chosen.paging, before_start=begin)
        watch = None
        if xen:
            watch = resolve(XEN_GUEST)(booted, adapt=adapt, symbols=_symbols(chosen.kernel, symbols))
        summary = _execute(booted, console_to_stderr=as_json, limit=max_instructions)
    finally:
        if recorder is not None:
            recorder.close()
    summary |= {"recorded": str(record) if record is not None else None}
    if watch is not None:
        summary["xen"] = watch.summary()
    if as_json:
        echo_json(summary)
    else:
        _print_summary(summary)
        if watch is not None:
            click.echo("\n".join(watch.lines()))
    ended = booted.execution.ended
    if ended is not None and not ended.clean:
        click.echo(crash_report(booted.execution), err=True)
        sys.exit(1)


def _check_xen(chosen: GuestChoice, *, adapt: bool, recorded: bool) -> None:
    """What goes with --xen."""
    if recorded:
        raise ConfigError("--record: not with --xen, whose hypercalls read memory that no step holds")
    if adapt and not chosen.feature.encrypted:
        raise ConfigError("--adapt: only of an encrypted guest; to a plain one nothing is missing")
    if chosen.feature.encrypted and chosen.paging is not Paging.OWN:
        raise ConfigError("--xen: of an encrypted guest only with --engine-paging own, which sees how pages are mapped")


def _symbols(kernel: Path, system_map: Path | None) -> Symbols:
    """The kernel's names, from the file that was given or from the kernel."""
    return read_symbols(system_map) if system_map is not None else kernel_symbols(kernel_image(kernel))


def _execute(booted: Booted, *, console_to_stderr: bool, limit: int | None) -> dict[str, Any]:
    execution = booted.execution
    console = _Console(booted, to_stderr=console_to_stderr)
    interrupted = False

    def ask_to_end(_signal: int, _frame: object) -> None:
        nonlocal interrupted
        interrupted = True
        if execution.engine is not None:
            execution.engine.stop()

    def watch(run: Execution) -> None:
        console.show()
        if interrupted:
            run.end("interrupted (Ctrl-C)")
        elif limit is not None and run.instructions >= limit:
            run.end(f"{limit} instructions", clean=True)

    execution.watch = watch
    execution.recorded = booted.recorded
    before = signal.signal(signal.SIGINT, ask_to_end)
    started = time.perf_counter()
    try:
        ended = execution.run()
    finally:
        signal.signal(signal.SIGINT, before)
    seconds = time.perf_counter() - started
    console.show()
    exits = {exit_name(code): count for code, count in sorted(execution.exits.items())}
    return {
        "ended": ended.reason,
        "clean": ended.clean,
        "kind": booted.image.kind,
        "launch_digest": booted.digest.hex() or None,
        "instructions": execution.instructions,
        "seconds": round(seconds, 3),
        "mips": round(execution.instructions / seconds / 1e6, 2),
        "virtual_seconds": round(booted.machine.tsc() / TSC_HZ, 6),
        "vmgexits": execution.exits[ExitCode.VMGEXIT],
        "exits": exits,
        "tlb_fills": execution.mmu.fills,
        "page_switches": execution.mmu.switches,
    }


class _Console:
    """What the guest writes to its serial port and debug console, as it comes."""

    def __init__(self, booted: Booted, *, to_stderr: bool) -> None:
        self._board = io.devices(booted.machine, booted.execution.vcpu)
        self._stream = sys.stderr if to_stderr else sys.stdout
        self._shown = 0

    def show(self) -> None:
        output = self._board.uart.output
        if len(output) > self._shown:
            self._stream.write(output[self._shown :].decode("latin-1").replace("\r\n", "\n"))
            self._stream.flush()
            self._shown = len(output)


def _print_summary(summary: dict[str, Any]) -> None:
    click.echo(f"\nended: {summary['ended']}")
    if summary["launch_digest"]:
        click.echo(f"launch digest: {summary['launch_digest']}")
    click.echo(
        f"{summary['instructions'] / 1e6:.3g} M instructions in {summary['seconds']:.1f} s,"
        f" {summary['virtual_seconds']:.3f} s of the guest's time"
    )
    exits = ", ".join(f"{name} {count}" for name, count in summary["exits"].items())
    click.echo(f"exits: {exits or 'none'}")
