"""Buffers at any address, of any length, with any bytes: a status of the architecture, and nothing else happens."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.events import AspCommand, AspStatus
from sevlab.core.layout_tools import strategy
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, GuestState, Status, crypto
from sevlab.plugins.sev.certificates import SevCertificate
from sevlab.plugins.sev.legacy import LEGACY_COMMANDS
from sevlab.plugins.sev.session import agreement_key
from sevlab.plugins.sev.states import LIVE

from tests.plugins.sev.world import PAGE, World, quiet, rejected

ADDRESSES = st.sampled_from(
    (0, 1, 16, 0xFF8, 0x1000, 0x2000, (1 << 30) - 16, 1 << 30, 1 << 46, 1 << 51, (1 << 64) - 16)
)
STATUSES = frozenset(Status)


@functools.cache
def world_in(state):
    world = World()
    if state is not GuestState.UNINIT:
        world.reach(state)
    world.machine.mark()
    return world


def plausible(world, declared):
    """A strategy of fields that are partly right: handles and addresses that exist, numbers at the edges."""
    numbers = st.one_of(st.sampled_from((0, 1, 16, 0x30, 0x34, 0x80, 0xD0, 0x824, PAGE, 0xFFFF_FFFF)), ADDRESSES)
    places = st.sampled_from((world.vm.memory_spa, world.place(4), world.place(6), world.vmsa_spa))
    fields = {}
    for name, info in declared.buffer.FIELDS.items():
        if name == "handle":
            fields[name] = st.sampled_from((world.handle, 0, 99))
        elif name.endswith("spa"):
            fields[name] = st.one_of(places, ADDRESSES)
        elif info.kind.value != "bytes":
            fields[name] = numbers.map(lambda number, info=info: number & info.maximum)
    return st.fixed_dictionaries({}, optional=fields)


@pytest.mark.parametrize("declared", [d for d in LEGACY_COMMANDS if d.buffer], ids=lambda d: d.command.name)
@given(st.data())
def test_any_plausible_buffer_gets_a_status_and_a_failure_changes_nothing(declared, data):
    world = world_in(data.draw(st.sampled_from((GuestState.UNINIT, *LIVE))))
    try:
        fields = data.draw(plausible(world, declared))
        before = quiet(world.machine)
        reply = world.run(declared.command, **fields)
        assert reply.status in STATUSES
        if reply.status and reply.status != Status.SECURE_DATA_INVALID:
            assert quiet(world.machine) == before
    finally:
        world.machine.reset()


@given(st.integers(0, 0x7FF), ADDRESSES, st.binary(max_size=80), st.sampled_from((GuestState.UNINIT, *LIVE)))
def test_any_bytes_for_any_number_at_any_address(number, spa, buffer, state):
    world = world_in(state)
    try:
        answer = world.machine.apply(AspCommand("sev", number, spa, buffer)).first(AspStatus)
        assert answer is None or answer.status in STATUSES
    finally:
        world.machine.reset()


@pytest.mark.parametrize("declared", [d for d in LEGACY_COMMANDS if d.buffer], ids=lambda d: d.command.name)
def test_a_command_buffer_that_is_no_memory_is_an_invalid_address(declared):
    machine = world_in(GuestState.RUNNING).machine
    end = machine.config.memory_bytes
    for spa in (end - declared.buffer_bytes + 1, end, 1 << 52, (1 << 64) - 1):
        assert machine.apply(AspCommand("sev", declared.command, spa, b"")).first(AspStatus).status == 0x09


def test_a_command_buffer_may_have_any_alignment_and_cross_a_page():
    world = world_in(GuestState.RUNNING)
    for offset in (1, 3, PAGE - 5):
        spa = world.place(2) + offset
        reply = sev.run(world.machine, Command.GUEST_STATUS, buffer_spa=spa, handle=world.handle)
        assert reply.buffer.state == GuestState.RUNNING
    world.machine.reset()


@pytest.mark.parametrize("layout", dict.fromkeys(d.buffer for d in LEGACY_COMMANDS if d.buffer))
@given(st.data())
def test_every_command_buffer_survives_a_round_trip(layout, data):
    image = data.draw(st.one_of(st.binary(min_size=layout.SIZE, max_size=layout.SIZE), strategy(layout)))
    assert layout.from_bytes(image).to_bytes() == image


@pytest.mark.parametrize("cut", range(0, SevCertificate.SIZE, 521))
def test_a_certificate_that_ends_early_opens_no_session(cut):
    """What follows a cut is what memory holds there: zeros."""
    world = world_in(GuestState.UNINIT)
    certificate, _ = world.session(0)
    fields = world.start_fields(0) | {"dh_spa": world.put(10, certificate[:cut].ljust(SevCertificate.SIZE, b"\0"))}
    if cut < COORDINATES_END:
        assert rejected(world.machine, Command.LAUNCH_START, **fields) == Status.INVALID_CERTIFICATE
    else:
        assert world.run(Command.LAUNCH_START, **fields).status == Status.SUCCESS
    world.machine.reset()


COORDINATES_END = 0x14 + 72 + 48
"""Behind the point nothing is looked at, not even a signature: anybody may open a session."""


def test_a_certificate_cut_at_any_byte_holds_a_key_only_when_its_point_is_whole():
    certificate, _ = world_in(GuestState.UNINIT).session(0)
    assert certificate[COORDINATES_END - 1]
    for cut in range(SevCertificate.SIZE):
        point = agreement_key(certificate[:cut].ljust(SevCertificate.SIZE, b"\0"))
        assert (point is not None) == (cut >= COORDINATES_END), cut


def test_every_bit_of_a_packets_mac_counts():
    keys = crypto.TransportKeys(bytes(16), bytes(range(16)))
    header, packet = crypto.seal_packet(keys, crypto.Context.DATA, bytes(64), iv=bytes(16))
    assert crypto.open_packet(keys, crypto.Context.DATA, header, packet) == bytes(64)
    for bit in range(8 * len(header)):
        flipped = bytearray(header)
        flipped[bit // 8] ^= 1 << bit % 8
        assert crypto.open_packet(keys, crypto.Context.DATA, bytes(flipped), packet) is None, bit
