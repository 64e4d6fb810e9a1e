"""Which call survives encryption: the table against what the plugin does."""

from __future__ import annotations

import pytest
from sevlab.plugins import sev
from sevlab.plugins.xen import SURVIVAL, Fate, Memop, Nr, Schedop, Vcpuop, enter_long_mode, survival
from sevlab.plugins.xen.assess import markdown_table
from sevlab.plugins.xen.numbers import ABI_FLAG, Errno

from tests.plugins.xen.world import BOUNCE, INFO, call, guest_of, machine_of

EFFECTS = {
    (Nr.SCHED_OP, Schedop.BLOCK),
    (Nr.VCPU_OP, Vcpuop.DOWN),
}
"""They survive, and end what the test runs on."""


def encrypted(abi="physical"):
    machine = machine_of(plugins=("sme", "sev"), guests=1, abi=abi)
    sev.launch_guest(machine, 0, loads={0: bytes(4096)})
    enter_long_mode(machine, machine.vcpus[0], shared=(BOUNCE, INFO))
    guest = guest_of(machine)
    guest.write(BOUNCE, bytes(4096))
    return machine


def arguments(row):
    if row.number == Nr.VCPU_OP:
        return row.command, 0, BOUNCE
    if row.number == Nr.GRANT_TABLE_OP:
        return row.command, BOUNCE, 1
    return (row.command, BOUNCE) if row.command >= 0 else (BOUNCE, 1)


RESERVATIONS = (Memop.INCREASE_RESERVATION, Memop.DECREASE_RESERVATION, Memop.POPULATE_PHYSMAP)


@pytest.mark.parametrize(
    "row", [row for row in SURVIVAL if row.fate is Fate.LINEAR], ids=lambda row: row.name.replace(" ", "-")
)
def test_what_fails_fails_with_the_legacy_abi_of_an_encrypted_guest(row):
    machine = encrypted()
    result = call(machine, row.number, *arguments(row))
    if row.number == Nr.MEMORY_OP and row.command in RESERVATIONS:
        assert result == 0  # how many extents were done
    else:
        assert result == -Errno.EFAULT
    if row.physical:
        again = call(machine, row.number | ABI_FLAG, *arguments(row))
        assert again != -Errno.EFAULT or (row.number, row.command) in NESTED


NESTED = {
    (Nr.GRANT_TABLE_OP, 2),
    (Nr.MEMORY_OP, 9),
    (Nr.MEMORY_OP, 13),
}
"""The zeros of the test name a buffer at address 0, which is private: it is read and written all the same."""


@pytest.mark.parametrize(
    "row",
    [row for row in SURVIVAL if row.fate is Fate.SURVIVES and (row.number, row.command) not in EFFECTS],
    ids=lambda row: row.name.replace(" ", "-"),
)
def test_what_survives_works_with_the_legacy_abi_of_an_encrypted_guest(row):
    arguments = (row.command, 0, 0) if row.command >= 0 else (0, 5)
    plain = call(machine_of(plugins=("sme", "sev"), guests=1, abi="physical"), row.number, *arguments)
    assert call(encrypted(), row.number, *arguments) == plain >= 0


def test_each_number_has_rows_and_replacements_are_named():
    assert {row.number for row in survival(Nr.EVENT_CHANNEL_OP)} == {Nr.EVENT_CHANNEL_OP}
    for row in SURVIVAL:
        assert row.physical == (row.fate is Fate.LINEAR)
        assert row.physical or not row.fast
    by_name = {row.name: row for row in SURVIVAL}
    assert by_name["vcpu_op register_runstate_memory_area"].instead == "register_runstate_phys_area"
    assert not by_name["grant_table_op copy"].fast
    assert by_name["event_channel_op send"].fast


def test_the_table_has_a_line_for_each_row():
    assert len(markdown_table().splitlines()) == len(SURVIVAL) + 2
