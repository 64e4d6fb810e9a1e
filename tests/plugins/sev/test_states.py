"""Every platform state with every command, and every guest state with every guest command."""

from __future__ import annotations

import functools

import pytest
from sevlab.core.events import CacheOp
from sevlab.plugins import sev
from sevlab.plugins.sev import GUEST, PLATFORM, Command, GuestState, PlatformState, Status, driver
from sevlab.plugins.sev.certificates import SevCertificate, Slot, Usage
from sevlab.plugins.sev.chain import make_certificate, signed_by
from sevlab.plugins.sev.crypto import public_point
from sevlab.plugins.sev.firmware import make_image
from sevlab.plugins.sev.legacy import LEGACY_COMMANDS
from sevlab.plugins.sev.states import LIVE

from tests.plugins.sev.world import PAGE, World, rejected

COMMANDS = [declared.command for declared in LEGACY_COMMANDS]
GUEST_COMMANDS = [command for command in GUEST.messages if command not in (Command.LAUNCH_START, Command.RECEIVE_START)]
NAME = lambda member: member.name


@functools.cache
def world_in(state):
    """One machine for each guest state (UNINIT: a platform without guests), to be reset."""
    world = World()
    if state is not GuestState.UNINIT:
        world.reach(state)
    world.machine.mark()
    return world


@pytest.fixture
def world(request):
    chosen = world_in(request.param)
    yield chosen
    chosen.machine.reset()


def platform(world):
    return sev.sev_state(world.machine).state


def prepare(world, command):
    """What must have happened before so that only the states decide."""
    machine = world.machine
    if command in (Command.ACTIVATE, Command.ACTIVATE_EX, Command.DECOMMISSION):
        world.need(Command.DEACTIVATE, handle=world.handle)
        driver.flush(machine)
    if command is Command.DF_FLUSH:
        machine.apply(CacheOp("wbinvd", 0))
    if command is Command.SWAP_IN:
        world.need(Command.SWAP_OUT, **world.fields(Command.SWAP_OUT))
    if command is Command.PEK_CERT_IMPORT:
        oca = 0xCAFE
        own = signed_by(make_certificate(Usage.OCA, public_point(oca), api=(1, 55)), Slot.FIRST, Usage.OCA, oca)
        world.need(Command.PEK_CSR, spa=world.place(6), length=PAGE)
        csr = SevCertificate.from_bytes(driver.get(machine, world.place(6), SevCertificate.SIZE))
        return {
            "pek_spa": world.put(6, signed_by(csr, Slot.FIRST, Usage.OCA, oca).to_bytes()),
            "pek_bytes": SevCertificate.SIZE,
            "oca_spa": world.put(7, own.to_bytes()),
            "oca_bytes": SevCertificate.SIZE,
        }
    if command is Command.DOWNLOAD_FIRMWARE:
        image = make_image("milan", (1, 56, 1))
        return {"spa": world.put(4, image), "length": len(image)}
    return world.fields(command)


def test_the_tables_name_exactly_the_commands_that_are_declared():
    assert set(PLATFORM.messages) == set(COMMANDS)
    assert set(GUEST.messages) <= set(COMMANDS)
    assert not PLATFORM.unreachable()
    assert not GUEST.unreachable()


@pytest.mark.parametrize("world", [GuestState.UNINIT], indirect=True)
@pytest.mark.parametrize("command", COMMANDS, ids=NAME)
@pytest.mark.parametrize("state", [PlatformState.UNINIT, PlatformState.INIT], ids=NAME)
def test_each_command_without_guests(world, state, command):
    fields = {} if command in GUEST_COMMANDS else prepare(world, command)
    fields = fields or world.fields(command)
    if state is PlatformState.UNINIT:
        world.need(Command.SHUTDOWN)
    target = PLATFORM.next(state, command)
    if target is None:
        assert rejected(world.machine, command, **fields) == Status.INVALID_PLATFORM_STATE
        return
    assert world.run(command, **fields).status == Status.SUCCESS
    assert platform(world) == target


@pytest.mark.parametrize("world", [GuestState.RUNNING], indirect=True)
@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in GUEST_COMMANDS], ids=NAME)
def test_each_platform_command_while_a_guest_runs(world, command):
    fields = prepare(world, command) if command is not Command.DECOMMISSION else world.fields(command)
    target = PLATFORM.next(PlatformState.WORKING, command)
    if target is None:
        assert rejected(world.machine, command, **fields) == Status.INVALID_PLATFORM_STATE
        return
    assert world.run(command, **fields).status == Status.SUCCESS
    assert platform(world) == target


@pytest.mark.parametrize("world", LIVE, indirect=True, ids=NAME)
@pytest.mark.parametrize("command", GUEST_COMMANDS, ids=NAME)
def test_each_guest_command_in_each_guest_state(world, command):
    guests = sev.sev_state(world.machine).guests
    state = guests[world.handle].state
    fields = prepare(world, command)
    target = GUEST.next(state, command)
    if target is None:
        assert rejected(world.machine, command, **fields) == Status.INVALID_GUEST_STATE
        return
    assert world.run(command, **fields).status == Status.SUCCESS, command.name
    assert (guests[world.handle].state if world.handle in guests else GuestState.UNINIT) == target
    assert platform(world) == (PlatformState.INIT if command is Command.DECOMMISSION else PlatformState.WORKING)


@pytest.mark.parametrize("world", [GuestState.RUNNING], indirect=True)
@pytest.mark.parametrize("command", GUEST_COMMANDS, ids=NAME)
def test_a_dead_handle_is_no_guest(world, command):
    fields = prepare(world, command) | {"handle": 99}
    if command is Command.GUEST_STATUS:
        assert world.need(command, **fields).state == GuestState.UNINIT
    else:
        assert rejected(world.machine, command, **fields) == Status.INVALID_GUEST


@pytest.mark.parametrize("world", [GuestState.RUNNING], indirect=True)
@pytest.mark.parametrize("command", [Command.LAUNCH_START, Command.RECEIVE_START], ids=NAME)
def test_a_start_makes_a_new_guest_beside_the_others(world, command):
    handle = world.need(command, **world.fields(command)).handle
    guests = sev.sev_state(world.machine).guests
    assert handle != world.handle
    assert guests[handle].state == GUEST.next(GuestState.UNINIT, command)
    assert guests[world.handle].state is GuestState.RUNNING
    assert world.need(Command.PLATFORM_STATUS).guest_count == 2


@pytest.mark.parametrize("world", [GuestState.RUNNING], indirect=True)
def test_the_platform_works_until_the_last_guest_is_gone(world):
    other = world.need(Command.LAUNCH_START, policy=0).handle
    world.need(Command.DECOMMISSION, handle=other)
    assert platform(world) is PlatformState.WORKING
    world.need(Command.DEACTIVATE, handle=world.handle)
    world.need(Command.DECOMMISSION, handle=world.handle)
    assert platform(world) is PlatformState.INIT


@pytest.mark.parametrize("world", [GuestState.RUNNING], indirect=True)
def test_shutdown_leaves_nothing_of_the_guests(world):
    world.need(Command.SHUTDOWN)
    state = sev.sev_state(world.machine)
    assert not state.guests
    assert not state.tmr.checksums
    assert not any(ccx.allocated | ccx.in_use for ccx in state.ccxs.values())
    status = world.need(Command.PLATFORM_STATUS)
    assert (status.state, status.guest_count, status.config, status.owner) == (0, 0, 0, 0)
