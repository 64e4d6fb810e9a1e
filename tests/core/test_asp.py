from __future__ import annotations

from types import ModuleType

import pytest
from sevlab.core.asp import AspCommandEntry, AspRegister, MailboxInterface
from sevlab.core.errors import PluginError
from sevlab.core.events import (
    AspCommand,
    AspRegisterRead,
    AspRegisterWrite,
    AspStatus,
    Fault,
    Faulted,
    Race,
    Refused,
    Value,
)
from sevlab.core.hookspecs import hookimpl
from sevlab.core.testing import make_machine

ONE = MailboxInterface("one", 0x10980, 0x109E0, 0x109E4, 0x7FF, 0x11, 0x09, 1 << 1)
TWO = MailboxInterface("two", 0x10944, 0x10948, 0x1094C, 0xFF, 0x01, 0x02, 0)
SEEN = []


def module(extra=lambda builder: None):
    plugin = ModuleType("asp_test", "Two mailboxes.")

    @hookimpl
    def sevlab_register(builder):
        def echo(machine, command):
            SEEN.append(command.buffer)
            if command.buffer[0] == 0xEE:
                command.error_stack = 0x0102_0304_0506_0708
                return 0x16
            command.reply = command.buffer[::-1]
            return 0

        builder.mailbox(ONE)
        builder.mailbox(TWO)
        builder.asp_commands.add(("one", 4), AspCommandEntry("ECHO", 8, echo))
        builder.asp_commands.add(("one", 14), AspCommandEntry("NOP", 0, lambda *_: 0))
        extra(builder)

    plugin.sevlab_register = sevlab_register
    return plugin


@pytest.fixture
def machine():
    SEEN.clear()
    return make_machine("sme", given={"asp_test": module()}, memory_bytes=1 << 20)


def read(machine, offset):
    return machine.apply(AspRegisterRead(offset)).first(Value).value


def write(machine, offset, value):
    return machine.apply(AspRegisterWrite(offset, value))


def test_a_fresh_mailbox_is_ready_and_empty(machine):
    assert read(machine, ONE.command_register) == 0


def test_the_handshake_runs_a_command(machine):
    machine.access.hypervisor_write(0x3000, b"12345678")
    write(machine, ONE.address_low_register, 0x3000)
    write(machine, ONE.address_high_register, 0)
    status = write(machine, ONE.command_register, 4 << 16).first(AspStatus)
    assert status == AspStatus(4, 0, b"87654321")
    assert read(machine, ONE.command_register) == 1 << 31 | 4 << 16
    assert machine.access.hypervisor_read(0x3000, 8) == b"87654321"


def test_the_one_step_command_is_the_same(machine):
    assert machine.apply(AspCommand("one", 4, 0x3000, b"12345678")).first(AspStatus) == AspStatus(4, 0, b"87654321")


def test_the_buffer_is_fetched_once(machine):
    machine.apply(Race(1, 0x3000, b"X"))
    machine.apply(AspCommand("one", 4, 0x3000, b"12345678"))
    assert SEEN == [b"X2345678"]
    machine.apply(Race(2, 0x3000, b"Y"))
    machine.apply(AspCommand("one", 4, 0x3000, b"12345678"))
    assert SEEN[1] == b"12345678"


def test_an_unknown_command_has_the_interfaces_own_status(machine):
    assert machine.apply(AspCommand("one", 5, 0x3000, b"")).first(AspStatus).status == 0x11
    assert machine.apply(AspCommand("two", 4, 0x3000, b"")).first(AspStatus).status == 0x01


def test_the_command_field_is_as_wide_as_the_interface_says(machine):
    write(machine, TWO.command_register, 0x1FF << 16)
    assert read(machine, TWO.command_register) == 1 << 31 | 0xFF << 16 | 1


@pytest.mark.parametrize(("spa", "status"), [((1 << 20) - 8, 0), ((1 << 20) - 7, 9), ((1 << 64) - 4, 9)])
def test_a_buffer_must_lie_in_memory(machine, spa, status):
    assert machine.apply(AspCommand("one", 4, spa, b"")).first(AspStatus).status == status


def test_the_c_bit_of_an_address_selects_the_hosts_key():
    machine = make_machine("sme", given={"asp_test": module()}, options={"sme": {"enabled": True}})
    machine.access.hypervisor_write(0x3000, b"12345678", c_bit=True)
    write(machine, ONE.address_low_register, 0x3000)
    write(machine, ONE.address_high_register, 1 << 51 - 32)
    assert write(machine, ONE.command_register, 4 << 16).first(AspStatus).buffer == b"87654321"
    assert machine.access.hypervisor_read(0x3000, 8, c_bit=True) == b"87654321"
    assert machine.access.hypervisor_read(0x3000, 8) != b"87654321"


def test_a_failed_command_leaves_the_buffer_and_overwrites_the_address_registers(machine):
    status = machine.apply(AspCommand("one", 4, 0x3000, b"\xee2345678")).first(AspStatus)
    assert (status.status, status.buffer) == (0x16, b"\xee2345678"[:8])
    assert read(machine, ONE.address_low_register) == 0x0506_0708
    assert read(machine, ONE.address_high_register) == 0x0102_0304


@pytest.mark.parametrize(
    ("enabled", "asked", "interface", "raised"),
    [(True, True, ONE, 1), (False, True, ONE, 0), (True, False, ONE, 0), (True, True, TWO, 0)],
)
def test_an_interrupt_needs_ioc_an_enabled_bit_and_an_interface_that_has_one(
    machine, enabled, asked, interface, raised
):
    machine.asp.interrupt_enable = 0xFFFF_FFFF if enabled else 0
    write(machine, interface.command_register, 14 << 16 | asked)
    assert machine.asp.interrupts_raised == raised
    assert bool(machine.asp.interrupt_status) == (asked and interface is ONE)


def test_an_absent_function_reads_all_ones(machine):
    machine.asp.present = False
    assert read(machine, ONE.command_register) == 0xFFFF_FFFF
    write(machine, ONE.command_register, 14 << 16)
    assert machine.asp.configuration_word(0) == 0xFFFF_FFFF


def test_configuration_space_names_the_function(machine):
    assert machine.asp.configuration_word(0) == 0x1486_1022
    assert machine.asp.configuration_word(0x40) == 0


def test_undeclared_registers_read_zero_and_ignore_writes(machine):
    write(machine, 0x44, 0x1234)
    assert read(machine, 0x44) == 0


def test_a_register_may_be_read_only():
    extra = lambda builder: builder.asp_registers.add(0x109FC, AspRegister(lambda _: 0x1_0000_0007, None))
    machine = make_machine("sme", given={"asp_test": module(extra)})
    write(machine, 0x109FC, 5)
    assert read(machine, 0x109FC) == 7


def test_an_unknown_interface_is_refused(machine):
    assert "no interface 'three'" in machine.apply(AspCommand("three", 0, 0, b"")).first(Refused).reason


def test_two_mailboxes_cannot_share_a_name_or_a_register():
    with pytest.raises(PluginError, match="already has a mailbox 'one'"):
        make_machine(given={"asp_test": module(lambda builder: builder.mailbox(ONE))})
    clash = TWO._replace(name="three")
    with pytest.raises(PluginError, match="ASP register 0x10944 is registered twice"):
        make_machine(given={"asp_test": module(lambda builder: builder.mailbox(clash))})


def test_a_driver_write_that_faults_runs_no_command():
    check = lambda actor, spa, gpa, kind: Fault(14, 2, spa) if kind & 1 else None
    machine = make_machine(given={"asp_test": module(lambda builder: builder.slot("access_check", check))})
    outcome = machine.apply(AspCommand("one", 14, 0x3000, b"x"))
    assert outcome.first(Faulted) is not None
    assert outcome.first(AspStatus) is None
