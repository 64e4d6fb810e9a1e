"""The demo chapter of the main job: a real boot is imported, replayed, and assessed for SEV-ES."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path as File

from sevlab.core.porting import Path
from sevlab.traces.assess.judge import Assessor
from sevlab.traces.assess.report import MEANING
from sevlab.traces.importers.catalogue import open_capture
from sevlab.traces.replay.engine import Replay

SAMPLE = File(__file__).parent / "samples" / "kvm-svm-linux-boot.trace.txt.xz"
SHOWN = 4


def chapter(say: Callable[[str], object]) -> None:
    """Import, replay and assess the capture that the package brings."""
    capture = open_capture(SAMPLE)
    entries = list(capture.entries())
    summary = capture.log.summary()
    say(f"   {SAMPLE.name}: a Linux guest boots under KVM on an AMD processor, SeaBIOS to power off.")
    say(
        f"   {summary['lines']:,} lines of kernel trace, {summary['exchanges']:,} exits,"
        f" {len(summary['unknown'])} unknown events, {summary['rejected']} lines not read.\n"
    )
    tally = Replay().run(entries)
    total = tally.document()["total"]
    say("   Replayed: the model serves every exit, and what it computes is compared with the log.")
    say(f"   {total['checked']:,} values checked, {total['inputs']:,} taken from the log, {total['diverged']} differ.")
    for rule, count in tally.explained.most_common(SHOWN):
        say(f"   explained {count:>4}  {rule}")
    result = Assessor("sev-es").run(entries)
    say(f"\n   The same guest under SEV-ES: {result.exits:,} exits become")
    for path in Path:
        say(f"   {result.total(path):>8,}  {path.value:<10} {MEANING[path]}")
    frequent = Counter({row.kind: row.exits for row in result.rows.values() if row.path is Path.NAE}).most_common(SHOWN)
    say(f"\n   Through the GHCB go {', '.join(f'{count:,} {kind}' for kind, count in frequent)}, ...")
    row = next(row for row in result.rows.values() if row.kind == "MMIO write" and row.path is Path.NAE)
    say("   One store to a device, executed in the model:")
    for line in row.executed.example:
        say(f"     {line}")
    say("\n   What cannot be served, and where:")
    for place in result.refused.values():
        say(f"   {place.exits:>4} x  rip {place.rip:#x}  {place.insn.hex(' ') or '-':<18} {place.reason}")
    early = sum(result.early.values())
    say(f"\n   {early:,} exits come from firmware and early boot, which need a #VC handler of their own.")
    say(f"   The whole report, with charts: sevlab assess {SAMPLE.name} --html boot.html")
