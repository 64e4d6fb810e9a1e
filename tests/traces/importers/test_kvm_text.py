"""Import of KVM event lines: every capture completely, every layout of the format page."""

import lzma
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from sevlab.core.errors import TraceFormatError
from sevlab.core.events import GuestExit
from sevlab.core.svm import EVENT_VALID, ExitCode
from sevlab.traces.importers import kvm_exits as ke
from sevlab.traces.importers import kvm_host as kh
from sevlab.traces.importers import kvm_interrupts as ki
from sevlab.traces.importers.catalogue import open_capture
from sevlab.traces.importers.events import EVENTS, parse_event
from sevlab.traces.importers.log_records import Entered, ExitEvent, Gap, HostActivity, OpaqueEvent
from sevlab.traces.importers.names import EXIT_REASONS

from tests.vectors import capture_set

LOGS = Path(__file__).parents[2] / "data" / "logs"
SHORT = ("kvm-svm-tiny", "kvm-svm-tiny-linux6.12")
WHOLE = ("kvm-svm-linux-boot", "kvm-svm-linux-microvm-smp2")
EVERY = [*SHORT, *(pytest.param(name, marks=pytest.mark.long) for name in WHOLE)]


def documented(name: str, what: str) -> dict[str, int]:
    """The counts that the captures' own page gives."""
    page = capture_set("README.md").read_text()
    section = next(part for part in page.split("\n## ") if part.split("\n", 1)[0].split()[0] == name)
    line = next(line for line in section.splitlines() if line.startswith(what))
    return {key: int(count) for key, count in re.findall(r"([\w ]+?) (\d+)[,.]", line.split(":", 1)[1] + ",")}


def read(path: Path, format_name: str = ""):
    capture = open_capture(path, format_name)
    entries = list(capture.entries())
    return entries, capture.log.summary()


@pytest.mark.parametrize("name", EVERY)
def test_every_event_of_a_capture_is_read(name):
    entries, summary = read(capture_set(f"{name}.trace.txt.xz"))
    assert summary["events"] == {key.strip(): n for key, n in documented(name, "Per event type").items()}
    assert (summary["unknown"], summary["rejected"], summary["gaps"], summary["headers"]) == ({}, 0, 0, 12)
    exits = Counter(entry.step.exit_code for entry in entries if isinstance(entry.step, GuestExit))
    expected = {EXIT_REASONS[key.strip()]: n for key, n in documented(name, "`kvm_exit` reasons").items()}
    assert exits == expected
    kept = Counter(type(record) for entry in entries for record in entry.outcome)
    for event in EVENTS.values():
        if event.name != "kvm_exit":
            assert kept[event.record] == summary["events"].get(event.name, 0), event.name


def test_the_tools_own_style_gives_the_same_but_for_what_it_does_not_print():
    full, _ = read(capture_set("kvm-svm-tiny.trace.txt.xz"))
    report, summary = read(capture_set("kvm-svm-tiny.report.txt.xz"))
    assert summary["format"] == "trace-cmd"
    assert summary["absent"] == 3 * 3707
    assert len(full) == len(report)
    for left, right in zip(full, report, strict=True):
        assert left.time_ns == right.time_ns
        if isinstance(left.step, GuestExit):
            assert left.step._replace(mode=0, event=0) == right.step
        kept = [record for record in left.outcome if not isinstance(record, ExitEvent)]
        for mine, its in zip(kept, right.outcome, strict=True):
            if isinstance(mine, ke.KvmEmulateInsn):
                assert (mine._replace(mode=""), its.mode) == (its, "")
            elif isinstance(mine, ki.KvmInjException) and mine.vector == 6:
                assert (mine.vector, its.vector, its.error_code) == (6, 6, ())
            elif isinstance(mine, (kh.KvmUpdateMasterClock, kh.KvmTrackTsc)):
                assert its == mine  # the clock's name there, its number here
            else:
                assert its == mine


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["trace", "trace-v6"])
def test_the_binary_twin_gives_equal_entries(suffix):
    if shutil.which("trace-cmd") is None:
        pytest.skip("trace-cmd is not installed")
    twin = capture_set(f"kvm-svm-tiny.{suffix}.dat.xz")
    text, _ = read(capture_set("kvm-svm-tiny.trace.txt.xz"))
    binary, summary = read(twin)
    assert summary["format"] == "trace.dat"
    assert binary == text


def test_the_exchange_of_an_out_holds_what_the_guest_wrote():
    entries, _ = read(capture_set("kvm-svm-tiny.trace.txt.xz"))
    out = next(e for e in entries if isinstance(e.step, GuestExit) and e.step.exit_code == ExitCode.IOIO)
    assert (out.step.rip, out.step.exit_info_1, out.step.exit_info_2) == (0x10039, 0x800010, 0x1003B)
    assert (out.step.stored, out.step.answers) == ((1,), ())
    assert [type(record) for record in out.outcome] == [
        ExitEvent, ke.KvmPio, kh.KvmFpu, kh.KvmUserspaceExit, kh.KvmFpu, ke.KvmEntry, Entered,
    ]  # fmt: skip


def test_an_interrupt_is_an_input_of_the_exchange_that_takes_it():
    entries, _ = read(capture_set("kvm-svm-tiny.trace.txt.xz"))
    woken = next(e for e in entries if isinstance(e.step, GuestExit) and e.step.exit_code == ExitCode.HLT)
    assert woken.step.arrivals == ((0, 0x40, 0),)
    assert woken.step.interruptible


@pytest.mark.parametrize("name", ["vmgexit.txt", "perf.txt"])
def test_layouts_without_capture_say_so(name):
    entries, summary = read(LOGS / name)
    assert summary["layout"] == "source-derived"
    assert summary["format"] == ("perf" if name == "perf.txt" else "ftrace")
    assert (summary["exchanges"], summary["unknown"], summary["rejected"]) == (3, {}, 0)
    exchanges = [e for e in entries if isinstance(e.step, GuestExit)]
    assert {e.step.exit_code for e in exchanges} == {ExitCode.VMGEXIT}
    assert ke.KvmVmgexitEnter(0, 0x7B, 0x3F80210, 0) in exchanges[0].outcome
    assert ke.KvmVmgexitMsrProtocolExit(0, 0x0002_0001_3300_0001, 1) in exchanges[2].outcome


def test_perf_and_tracefs_of_the_same_lines_give_equal_entries():
    assert read(LOGS / "perf.txt")[0] == read(LOGS / "vmgexit.txt")[0]


def test_newer_kernels_print_more_and_unknown_events_are_kept():
    entries, summary = read(LOGS / "newer.txt")
    exchange = next(e for e in entries if isinstance(e.step, GuestExit))
    assert exchange.outcome[0] == ExitEvent(0x306, 0, (4,))
    assert exchange.step.event == 0
    assert not 0x306 & EVENT_VALID
    assert summary["unknown"] == {"kvm_snp_psc": 1}
    assert OpaqueEvent("kvm_snp_psc", "vcpu 0, pfn 1f4a3c, gpa 1a3c000, op private, level 1") in exchange.outcome
    entry = next(record for record in entries[0].outcome if isinstance(record, ke.KvmEntry))
    assert (entry.intr_info, entry.error_code) == ((0x80000B0E,), (0,))


def test_lost_events_end_what_was_under_way():
    entries, summary = read(LOGS / "lost.txt")
    assert (summary["gaps"], summary["rejected"], summary["unfinished"]) == (2, 0, 1)
    assert summary["unknown"] == {"kvm_exit": 1, "kvm_ex": 1}
    gaps = [record for entry in entries for record in entry.outcome if isinstance(record, Gap)]
    assert gaps == [Gap(0, (12,)), Gap(0, ())]
    steps = [type(entry.step) for entry in entries]
    assert steps.index(GuestExit) < steps.index(HostActivity, 1)


def test_a_file_of_no_format_is_refused_with_what_was_tried(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("Dear diary,\n")
    with pytest.raises(TraceFormatError, match=r"(?s)tried:.*trace\.dat: it starts with.*ftrace: .*Dear diary"):
        open_capture(path)


def test_garbage_between_lines_is_counted_and_shown(tmp_path):
    path = tmp_path / "log.txt.xz"
    text = (LOGS / "vmgexit.txt").read_text().splitlines(keepends=True)
    text[5:5] = ["\x00\x01 not a line\n"] * 12
    path.write_bytes(lzma.compress("".join(text).encode()))
    _, summary = read(path)
    assert summary["rejected"] == 12
    assert len(summary["examples"]) == 10
    assert summary["examples"][0].startswith("line 6: ")


PUBLISHED = {
    "kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0xd": ke.KvmPio(False, 0x3F8, 1, 1, 0xD, False),
    "kvm_pio: pio_read at 0x1f0 size 2 count 256 val 0x45 (...)": ke.KvmPio(True, 0x1F0, 2, 256, 0x45, True),
    "kvm_msr: msr_write 1d9 = 0x4000 (#GP)": ke.KvmMsr(True, 0x1D9, 0x4000, True),
    "kvm_inj_virq: Soft/INTn 0x80 [reinjected]": ki.KvmInjVirq(0x80, True, True),
    "kvm_inj_virq: irq 236": ki.KvmInjVirq(236, False, False),
    "kvm_inj_exception: #UD": ki.KvmInjException(6, (), False),
    "kvm_page_fault: address fee00000 error_code 6": ke.KvmPageFault((), (), 0xFEE00000, 6),
    "kvm_apic: apic_read APIC_LVR = 0x50014": ki.KvmApic(False, 0x30, 0x50014),
    "kvm_apic: apic_read 0x110 = 0x0": ki.KvmApic(False, 0x110, 0),
    "kvm_apic_ipi: dst 1 vec 154 (SIPI|physical|assert|edge|dst)": ki.KvmApicIpi(1, 154, 6, False, True, False, 0),
    "kvm_apic_ipi: dst 0 vec 251 (Fixed|physical|assert|edge|all-but-self)": ki.KvmApicIpi(
        0, 251, 0, False, True, False, 3
    ),
    "kvm_apicv_accept_irq: apicid 3 vec 48 (LowPrio|level)": ki.KvmApicvAcceptIrq(3, 48, 1, True),
    "kvm_set_irq: gsi 0 level 0 source 2": ki.KvmSetIrq(0, 0, 2),
    "kvm_mmio: mmio unsatisfied-read len 4 gpa 0xfebf1000 val 0x0": ke.KvmMmio("unsatisfied-read", 4, 0xFEBF1000, 0),
    "kvm_nested_vmexit: vcpu 0 reason npf rip 0x400433 info1 0x0000000200000006 info2 0x0000000000641000"
    " intr_info 0x00000000 error_code 0x00000000": ke.KvmNestedVmexit(
        (0,), 0x400, 0x400433, 0x200000006, 0x641000, (0,), (0,), ()
    ),
    "kvm_exit: reason PF excp rip 0xfd0bd info 6 10": ke.KvmExit((), 0x4E, 0xFD0BD, 6, 0x10, (), (), ()),
    "kvm_entry: vcpu 1, rip 0xffffffff8100021a[immediate exit]": ke.KvmEntry(1, 0xFFFFFFFF8100021A, True, (), ()),
    "kvm_wait_lapic_expire: vcpu 0: delta -5 (early)": kh.KvmWaitLapicExpire(0, (1 << 64) - 5, False),
    "kvm_pvclock_update: vcpu_id 0, pvclock { version 2, tsc_timestamp 0x88f7fe0, system_time 0xd801910,"
    " tsc_to_system_mul 0xd15ecc24, tsc_shift -1, flags 0x1 }": kh.KvmPvclockUpdate(
        0, 2, 0x88F7FE0, 0xD801910, 0xD15ECC24, 0xFF, 1
    ),
    "kvm_cpuid: func 1 rax 6f1 rbx 800 rcx 80 rdx 7, cpuid entry found": ke.KvmCpuid(
        1, (), 0x6F1, 0x800, 0x80, 7, True, False
    ),
    "kvm_cpuid: func 4 idx 1 rax 0 rbx 0 rcx 0 rdx 0, cpuid entry not found, used max basic": ke.KvmCpuid(
        4, (1,), 0, 0, 0, 0, False, True
    ),
    "kvm_hypercall: nr 0xc a0 0x100000 a1 0x200 a2 0x10 a3 0x0": ke.KvmHypercall(12, 0x100000, 0x200, 0x10, 0),
}


@pytest.mark.parametrize("body", PUBLISHED)
def test_published_lines(body):
    name, _, text = body.partition(": ")
    assert parse_event(name, text) == PUBLISHED[body]


@pytest.mark.parametrize("name", EVENTS)
def test_an_event_with_another_text_is_not_guessed(name):
    assert parse_event(name, "something else") is None
