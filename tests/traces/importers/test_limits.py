"""What a log can make an importer keep: bounded, whatever its lines are."""

import io
import tracemalloc
from pathlib import Path

import pytest
from sevlab.core.events import GuestExit
from sevlab.traces.importers.exchanges import MAX_LINES
from sevlab.traces.importers.kvm_text import KvmText, recognise
from sevlab.traces.importers.log_records import HostActivity
from sevlab.traces.importers.source import MAX_LINE_BYTES, Source

EXIT = "vcpu 0 reason io rip 0x1 info1 0x3f80210 info2 0x2 intr_info 0x00000000 error_code 0x00000000"


def line(body: str, *, tid: int = 7, micros: int = 0) -> str:
    return f" cpu-{tid}  [000] .....  1.{micros:06}: {body}"


def log(*lines: str) -> KvmText:
    return KvmText("ftrace", lines)


def test_an_exchange_that_does_not_end_is_given_up():
    pio = line("kvm_pio: pio_read at 0x3f8 size 1 count 1 val 0x60")
    text = log(line("kvm_entry: vcpu 0, rip 0x1"), line(f"kvm_exit: {EXIT}"), *[pio] * (3 * MAX_LINES))
    entries = list(text.entries())
    assert text.summary()["unfinished"] == 1
    assert all(len(entry.outcome) <= 2 * MAX_LINES for entry in entries)
    assert sum(type(record).__name__ == "KvmPio" for entry in entries for record in entry.outcome) == 3 * MAX_LINES


def test_an_exchange_to_the_limit_is_one():
    pio = line("kvm_pio: pio_read at 0x3f8 size 1 count 1 val 0x60")
    head = [line("kvm_entry: vcpu 0, rip 0x1"), line(f"kvm_exit: {EXIT}")]
    *_, entry = log(*head, *[pio] * (MAX_LINES - 3), line("kvm_entry: vcpu 0, rip 0x2")).entries()
    assert isinstance(entry.step, GuestExit)
    assert len(entry.step.answers) == MAX_LINES - 3


def test_a_vcpu_that_is_never_entered_again_does_not_hold_back_the_others():
    served = [
        line("kvm_entry: vcpu 1, rip 0x1", tid=8),
        line(f"kvm_exit: {EXIT.replace('vcpu 0', 'vcpu 1')}", tid=8),
        line("kvm_pio: pio_write at 0x3f8 size 1 count 1 val 0x60", tid=8),
    ]
    turn = [line("kvm_entry: vcpu 0, rip 0x1"), line(f"kvm_exit: {EXIT}")]
    text = log(*served, *turn * (MAX_LINES + 10))
    for number, entry in enumerate(text.entries()):
        if isinstance(entry.step, GuestExit):
            assert number <= 3
            break
    assert text._exchanges.exchanges <= MAX_LINES + 2  # the first came out before the last was read


def test_many_threads_and_waiting_interrupts_are_forgotten():
    lines = [line("kvm_fpu: load", tid=n + 1) for n in range(3 * MAX_LINES)]
    lines += [line(f"kvm_apic_accept_irq: apicid {n:x} vec 48 (Fixed|edge)") for n in range(3 * MAX_LINES)]
    text = log(*lines)
    assert all(isinstance(entry.step, HostActivity) for entry in text.entries())
    assert len(text._exchanges._arrived) <= 2 * MAX_LINES


@pytest.mark.parametrize("head", ["a" * 200_000, " " * 16_000 + "x", "1 " * 8_000, " cpu-7 [0" * 1_000])
def test_a_long_line_takes_no_time_and_is_none(head):
    text = log(head, head + ": kvm_entry: vcpu 0, rip 0x1", head + " 1.000000: kvm_entry: vcpu 0, rip 0x1")
    assert list(text.entries()) == []
    assert text.summary()["rejected"] == 3
    assert recognise(head[:16384].encode()) == ""


@pytest.mark.parametrize("front", [" cpu-99999999999  [000] .....  1.000000", " cpu-7  [000] ..... 99999999999.000000"])
def test_a_number_that_no_kernel_prints_is_no_event(front):
    text = log(f"{front}: kvm_entry: vcpu 0, rip 0x1")
    assert list(text.entries()) == []
    assert text.summary()["rejected"] == 1


class Endless(io.RawIOBase):
    """A file of one line."""

    def __init__(self, size: int) -> None:
        self.left = size

    def readinto(self, buffer: bytearray) -> int:
        count = min(len(buffer), self.left)
        buffer[:count] = b"x" * count
        self.left -= count
        return count

    def readable(self) -> bool:
        return True


def test_a_file_without_line_ends_comes_in_pieces_with_flat_memory():
    stream = io.BufferedReader(Endless(64 << 20))
    tracemalloc.start()
    pieces = [len(piece) for piece in Source(Path("x"), stream, b"", stream).text()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(pieces) == 64 << 20
    assert max(pieces) <= 2 * MAX_LINE_BYTES
    assert peak < 4 << 20


@pytest.mark.parametrize("text", [b"", b"\n", b"a", b"a\n", b"a\nb", b"a\n\nb\n", b"\xff\n\xc3\xa9", b"a\r\nb"])
def test_lines_are_those_of_the_text(text):
    stream = io.BufferedReader(io.BytesIO(text))
    lines = list(Source(Path("x"), stream, b"", stream).text())
    assert lines == text.decode("utf-8", "backslashreplace").removesuffix("\n").split("\n")[: None if text else 0]


@pytest.mark.parametrize(("code", "unknown"), [("0x80000000", 0), ("0080000000", 1), ("0800000000", 1)])
def test_an_event_is_words_of_32_bits(code, unknown):
    """A line with a longer one is not of the layout that prints it: EXITINTINFO would not fit its 64 bits."""
    body = EXIT.replace("intr_info 0x00000000 error_code 0x00000000", f"intr_info 0x80000b0e error_code {code}")
    text = log(line("kvm_entry: vcpu 0, rip 0x1"), line(f"kvm_exit: {body}"), line("kvm_entry: vcpu 0, rip 0x2"))
    events = [entry.step.event for entry in text.entries() if isinstance(entry.step, GuestExit)]
    assert events == ([] if unknown else [0x80000000_80000B0E])
