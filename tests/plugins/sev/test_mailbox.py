"""The registers of the PCI function per generation, the handshake, interrupts, and ring-buffer mode."""

from __future__ import annotations

import pytest
from sevlab.core.events import AspRegisterRead, AspRegisterWrite, AspStatus, Value
from sevlab.core.testing import assert_offsets, make_machine
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, Status, driver
from sevlab.plugins.sev.buffers import GuestStatus, PlatformStatus
from sevlab.plugins.sev.layout import PacketHeader, Session, SwapMetadata
from sevlab.plugins.sev.mailbox import VARIANTS
from sevlab.plugins.sev.ring import RingCommand, RingControl, RingHead, RingStatus

PAGE = 4096
REGISTERS = {
    "naples": (0x1456, 0x10580, 0x105E0, 0x105E4, 0x10610, 0x10614, 0x105FC),
    "rome": (0x1486, 0x10980, 0x109E0, 0x109E4, 0x10690, 0x10694, 0x109FC),
    "milan": (0x1486, 0x10980, 0x109E0, 0x109E4, 0x10690, 0x10694, 0x109FC),
    "genoa": (0x14CA, 0x10980, 0x109E0, 0x109E4, 0x10690, 0x10694, 0x109FC),
    "turin": (0x17D8, 0x10980, 0x109E0, 0x109E4, 0x10510, 0x10514, 0x109FC),
}
"""Device, CmdResp, address low and high, interrupt enable and status, capability. Source: Linux sp-pci.c."""


def read(machine, offset):
    return machine.apply(AspRegisterRead(offset)).first(Value).value


def write(machine, offset, value):
    return machine.apply(AspRegisterWrite(offset, value))


@pytest.mark.parametrize("generation", REGISTERS)
def test_each_generation_has_its_device_and_its_registers(generation):
    device, command, low, high, enable, status, feature = REGISTERS[generation]
    machine = make_machine("sev", generation=generation)
    assert machine.asp.configuration_word(0) == device << 16 | 0x1022
    assert read(machine, feature) & 1
    assert read(machine, command) == 0
    page = machine.hypervisor.allocate_pages(1)
    write(machine, low, page)
    write(machine, high, 0)
    write(machine, enable, 0xFFFF_FFFF)
    answer = write(machine, command, Command.PLATFORM_STATUS << 16 | 1).first(AspStatus)
    assert answer.status == Status.SUCCESS
    assert PlatformStatus.from_bytes(driver.get(machine, page, 12)).api_minor == 55
    assert read(machine, command) >> 31 == 1
    assert read(machine, status) == 1 << 1
    write(machine, status, 1 << 1)
    assert read(machine, status) == 0


def test_without_interrupt_on_completion_the_driver_polls():
    machine = make_machine("sev")
    write(machine, 0x10690, 0xFFFF_FFFF)
    write(machine, 0x10980, Command.NOP << 16)
    assert read(machine, 0x10980) == 1 << 31 | Command.NOP << 16
    assert (read(machine, 0x10694), machine.asp.interrupts_raised) == (0, 0)


def test_the_address_registers_hold_an_error_stack_after_each_command():
    machine = make_machine("sev")
    write(machine, 0x109E0, 0x5000)
    write(machine, 0x10980, Command.DECOMMISSION << 16)
    assert read(machine, 0x10980) & 0xFFFF == Status.INVALID_PLATFORM_STATE
    assert read(machine, 0x109E0) != 0x5000
    write(machine, 0x10980, Command.NOP << 16)
    assert (read(machine, 0x109E0), read(machine, 0x109E4)) == (0, 0)


@pytest.mark.parametrize("number", [0x00, 0x10, 0x26, 0x37, 0x62, 0x72, 0x7FF])
def test_numbers_without_a_command_are_invalid(number):
    machine = make_machine("sev")
    assert write(machine, 0x10980, number << 16).first(AspStatus).status == Status.INVALID_COMMAND


@pytest.mark.parametrize("generation", REGISTERS)
def test_unused_interfaces_answer_like_silent_hardware(generation):
    machine = make_machine("sev", generation=generation)
    variant = VARIANTS[REGISTERS[generation][0]]
    for first in (variant.psp_mailbox, variant.platform_access):
        if first:
            assert read(machine, first) == 0
            write(machine, first, 1 << 16)
            assert read(machine, first) >> 31 == 1
            assert read(machine, first) & 0xFFFF
    for silent in (variant.doorbell, variant.tee_ring, 0x10000):
        write(machine, silent, 0xFFFF_FFFF)
        assert read(machine, silent) == 0


def test_a_hidden_function_reads_all_ones():
    machine = make_machine("sev")
    machine.asp.present = False
    assert read(machine, 0x109FC) == 0xFFFF_FFFF
    assert "not there" in machine.apply(driver.AspCommand("sev", 4, 0x1000, bytes(12))).records[0].reason


def test_layouts_lie_where_the_headers_put_them():
    assert_offsets(Session, {"wrap_tk": (0x10, 32), "wrap_iv": (0x30, 16), "policy_mac": (0x60, 32)}, 0x80)
    assert_offsets(PacketHeader, {"iv": (4, 16), "mac": (0x14, 32)}, 0x34)
    assert_offsets(GuestStatus, {"policy": (4, 4), "asid": (8, 4), "state": (12, 1)}, 13)
    assert_offsets(SwapMetadata, {"iv": (8, 8), "tag": (16, 16), "page_type": (60, 4)}, 64)


# Ring-buffer mode ---------------------------------------------------------------------------------------------------

COMMAND, HEAD, TAIL = 0x10980, 0x109E0, 0x109E4
BOTH = 3 << 30


class Rings:
    """A machine in ring-buffer mode with both queues; `push` adds an entry, `go` writes the control word."""

    def __init__(self, machine, **changes):
        self.machine = machine
        pages = machine.hypervisor.allocate_pages(6)
        self.commands = {"low": pages, "high": pages + 2 * PAGE}
        self.statuses = {"low": pages + PAGE, "high": pages + 3 * PAGE}
        self.buffers = pages + 4 * PAGE
        self.tail = {"low": 0, "high": 0}
        self.fields = {
            "low_commands_spa": self.commands["low"],
            "low_statuses_spa": self.statuses["low"],
            "high_commands_spa": self.commands["high"],
            "high_statuses_spa": self.statuses["high"],
            "low_pages": 1,
            "high_pages": 1,
        } | changes

    def enter(self):
        sev.need(self.machine, Command.RING_BUFFER, **self.fields)
        return self

    def push(self, command, queue="low", buffer=b"", **flags):
        index = self.tail[queue]
        spa = self.buffers + 64 * index + (2048 if queue == "high" else 0)
        driver.put(self.machine, spa, buffer)
        entry = RingCommand.build(command=command, buffer_spa=spa, **flags)
        driver.put(self.machine, self.commands[queue] + 16 * index, entry)
        self.tail[queue] = (index + 1) % 256
        write(self.machine, TAIL, self.tail["low"] | self.tail["high"] << 16)
        return spa

    def go(self, **control):
        word = int.from_bytes(RingControl.build(active=1, host_control=1, **control), "little")
        return write(self.machine, COMMAND, word)

    @property
    def head(self):
        return RingHead.from_bytes(read(self.machine, HEAD).to_bytes(4, "little"))

    def status(self, queue, index):
        return RingStatus.from_bytes(driver.get(self.machine, self.statuses[queue] + 16 * index, 16)).status


@pytest.fixture
def ready():
    machine = make_machine("sev", guests=1)
    sev.initialise(machine)
    return machine


def statuses_of(outcome):
    return [(record.command, record.status) for record in outcome.records if isinstance(record, AspStatus)]


def test_queued_commands_run_in_order_the_high_queue_first(ready):
    rings = Rings(ready).enter()
    rings.push(Command.NOP)
    spa = rings.push(Command.PLATFORM_STATUS, buffer=bytes(12))
    rings.push(Command.DF_FLUSH, queue="high", continue_on_error=1)
    outcome = rings.go()
    assert statuses_of(outcome) == [(0x0A, Status.WBINVD_REQUIRED), (0x0E, 0), (0x04, 0)]
    assert [rings.status("low", 0), rings.status("low", 1), rings.status("high", 0)] == [0, 0, Status.WBINVD_REQUIRED]
    assert (rings.head.low, rings.head.high, rings.head.low_running, rings.head.high_running) == (2, 1, 1, 1)
    assert PlatformStatus.from_bytes(driver.get(ready, spa, 12)).state == 1


def test_a_failing_command_pauses_its_queue_until_it_is_resumed(ready):
    rings = Rings(ready).enter()
    rings.push(Command.DECOMMISSION, buffer=bytes(4))
    rings.push(Command.NOP)
    assert statuses_of(rings.go()) == [(Command.DECOMMISSION, Status.INVALID_PLATFORM_STATE)]
    assert (rings.head.low, rings.head.low_running, rings.head.queue_paused) == (1, 0, 1)
    assert statuses_of(rings.go(resume_low=1)) == []
    assert rings.head.low_running == 1
    assert statuses_of(rings.go(clear_interrupts=1)) == [(Command.NOP, 0)]
    assert (rings.head.low, rings.head.queue_paused) == (2, 0)


def test_interrupts_of_completion_emptiness_and_threshold(ready):
    rings = Rings(ready, low_threshold=2, interrupt_on_empty=1).enter()
    ready.asp.interrupt_enable = 0xFFFF_FFFF
    rings.push(Command.NOP, interrupt_on_completion=1)
    rings.go(low_empty_interrupt=1)
    head = rings.head
    assert (head.command_done, head.all_empty, head.queue_free, head.queue_paused) == (1, 1, 1, 0)
    assert ready.asp.interrupt_status == 1 << 1
    rings.go(clear_interrupts=1)
    assert (rings.head.command_done, rings.head.all_empty, rings.head.queue_free) == (0, 1, 0)


def test_a_quiet_queue_raises_no_interrupt(ready):
    rings = Rings(ready).enter()
    ready.asp.interrupt_enable = 0xFFFF_FFFF
    rings.push(Command.NOP)
    rings.go()
    assert ready.asp.interrupts_raised == 0


def test_the_queue_wraps_after_256_entries(ready):
    rings = Rings(ready).enter()
    for number in range(300):
        rings.push(Command.NOP)
        assert statuses_of(rings.go()) == [(Command.NOP, 0)]
        assert rings.head.low == (number + 1) % 256


def test_a_normal_command_leaves_the_mode_and_is_not_run(ready):
    rings = Rings(ready).enter()
    rings.push(Command.NOP)
    assert sev.run(ready, Command.PDH_GEN).status == Status.RING_BUFFER_EXIT
    assert read(ready, COMMAND) == 1 << 31 | Status.RING_BUFFER_EXIT
    assert sev.run(ready, Command.PDH_GEN).status == Status.SUCCESS
    assert rings.status("low", 0) == 0


def test_shutdown_in_a_queue_ends_the_mode(ready):
    rings = Rings(ready).enter()
    rings.push(Command.SHUTDOWN)
    rings.push(Command.NOP)
    assert statuses_of(rings.go()) == [(Command.SHUTDOWN, 0)]
    assert sev.run(ready, Command.INIT).status == Status.SUCCESS


def test_commands_keep_out_of_the_queues(ready):
    rings = Rings(ready).enter()
    buffer = (rings.statuses["low"]).to_bytes(8, "little") + (0x1000).to_bytes(4, "little")
    rings.push(Command.PEK_CSR, buffer=buffer, continue_on_error=1)
    assert statuses_of(rings.go()) == [(Command.PEK_CSR, Status.INVALID_ADDRESS)]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"low_pages": 0}, Status.INVALID_PARAM),
        ({"low_pages": 2}, Status.INVALID_PARAM),
        ({"high_pages": 2}, Status.INVALID_PARAM),
        ({"low_commands_spa": 0x1010}, Status.INVALID_ADDRESS),
        ({"low_statuses_spa": 0x1010}, Status.INVALID_ADDRESS),
        ({"high_commands_spa": 0x1010}, Status.INVALID_ADDRESS),
        ({"high_statuses_spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"high_pages": 0, "high_statuses_spa": 0x1010}, Status.SUCCESS),
    ],
)
def test_the_queues_are_one_page_each(ready, change, status):
    rings = Rings(ready, **change)
    assert sev.run(ready, Command.RING_BUFFER, **rings.fields).status == status


def test_the_mode_cannot_be_entered_twice(ready):
    rings = Rings(ready).enter()
    buffer = driver.BUFFERS[Command.RING_BUFFER].build(**rings.fields)
    rings.push(Command.RING_BUFFER, buffer=buffer, continue_on_error=1)
    assert statuses_of(rings.go()) == [(Command.RING_BUFFER, Status.INVALID_PARAM)]
