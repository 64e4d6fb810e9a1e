"""The ccp driver's log: buffers, nesting, failures. The layout is source-derived; no capture of it exists here."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.events import AspCommand, AspStatus
from sevlab.traces.importers.catalogue import open_capture
from sevlab.traces.importers.ccp_log import dump_bytes
from sevlab.traces.importers.log_records import OpaqueEvent

LOG = Path(__file__).parents[2] / "data" / "logs" / "ccp.txt"


def read():
    capture = open_capture(LOG)
    entries = list(capture.entries())
    return entries, capture.log.summary()


def test_commands_come_with_their_buffers_in_byte_order():
    entries, summary = read()
    assert summary["format"] == "ccp"
    assert summary["layout"] == "source-derived"
    status = entries[0]
    assert status.step == AspCommand("sev", 4, 0x1104CE9000, bytes(12))
    assert status.outcome == (AspStatus(4, 0, bytes.fromhex("013701000000180300000000")),)


def test_a_nested_command_ends_before_the_one_around_it():
    entries, _ = read()
    inner, outer = entries[1], entries[2]
    assert (inner.step.command, outer.step.command) == (0xC7, 0x30)
    assert inner.step.buffer == (0x1104CE9001).to_bytes(8, "little")
    assert outer.step.buffer[4:8] == bytes((5, 0, 0, 0))
    assert len(outer.step.buffer) == 36
    assert outer.outcome[0].buffer[:8] == bytes((1, 0, 0, 0, 5, 0, 0, 0))


def test_a_command_without_buffer_and_one_of_odd_length():
    entries, _ = read()
    flush, guest = entries[3], entries[4]
    assert (flush.step.command, flush.step.buffer, flush.outcome) == (0xA, b"", (AspStatus(0xA, 0, b""),))
    assert (guest.step.command, len(guest.step.buffer)) == (0x23, 13)
    assert guest.outcome[0].buffer[-1] == 2


def test_a_failure_has_its_status_and_a_stray_row_is_kept():
    entries, summary = read()
    assert AspStatus(0x36, 0x18, b"\x01\0\0\0") in [record for entry in entries for record in entry.outcome]
    assert summary["failed"] == {"0x18": 1}
    assert summary["unknown"] == {"dump without command": 1}
    assert any(isinstance(record, OpaqueEvent) for entry in entries for record in entry.outcome)


@given(st.binary(min_size=1, max_size=16))
def test_a_row_is_read_back_as_the_kernel_prints_it(data):
    if len(data) % 2:
        printed = " ".join(f"{byte:02x}" for byte in data)
    else:
        printed = " ".join(f"{int.from_bytes(data[n : n + 2], 'little'):04x}" for n in range(0, len(data), 2))
    assert dump_bytes(printed) == data
