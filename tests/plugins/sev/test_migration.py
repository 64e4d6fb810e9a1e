"""SEND on one machine, RECEIVE on another: memory and VMSA arrive, and nothing that was tampered with does."""

from __future__ import annotations

import functools

import pytest
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, GuestState, Policy, Status, crypto, driver
from sevlab.plugins.sev.certificates import SevCertificate, Slot, Usage
from sevlab.plugins.sev.chain import make_certificate, signed_by
from sevlab.plugins.sev.context import NO_KEYS
from sevlab.plugins.sev.firmware import make_image
from sevlab.plugins.sev.layout import CERTIFICATE_BYTES, CHAIN_BYTES, PacketHeader, Session
from sevlab.plugins.sev.vendor import signed_by_vendor, vendor_certificate

from tests.plugins.sev.world import KEYS, PAGE, PLAINTEXT, VMSA, World, rejected


@functools.cache
def platforms(policy):
    """A source with a running guest, and a target that waits."""
    source, target = World(policy, seed=b"source").reach(GuestState.RUNNING), World(policy, seed=b"target")
    source.machine.mark()
    target.machine.mark()
    return source, target


@pytest.fixture
def two(request):
    made = platforms(getattr(request, "param", Policy.ES))
    yield made
    for world in made:
        world.machine.reset()


def send_start_fields(source, target, **changes):
    """SEND_START for the target's certificates, with the CEK signed by the simulated vendor as a key server does."""
    pdh, chain = target.export()
    pek, oca, cek = (chain[start : start + CERTIFICATE_BYTES] for start in range(0, CHAIN_BYTES, CERTIFICATE_BYTES))
    generation = target.machine.config.generation
    parts = {
        "pdh": pdh,
        "pek": pek,
        "oca": oca,
        "cek": signed_by_vendor(SevCertificate.from_bytes(cek), generation).to_bytes(),
        "amd": vendor_certificate(generation, Usage.ASK).to_bytes()
        + vendor_certificate(generation, Usage.ARK).to_bytes(),
    } | changes
    platform = parts["pek"] + parts["oca"] + parts["cek"]
    return {
        "handle": source.handle,
        "pdh_spa": source.put(6, parts["pdh"]),
        "pdh_bytes": len(parts["pdh"]),
        "platform_spa": source.put(7, platform),
        "platform_bytes": len(platform),
        "amd_spa": source.put(10, parts["amd"]),
        "amd_bytes": len(parts["amd"]),
        "session_spa": source.place(9),
        "session_bytes": Session.SIZE,
    }


def start(source, target):
    """SEND_START and RECEIVE_START; the target's guest is VM 0 of its machine."""
    policy = source.need(Command.SEND_START, **send_start_fields(source, target)).policy
    session = driver.get(source.machine, source.place(9), Session.SIZE)
    pdh, _ = source.export()
    target.handle = target.need(Command.RECEIVE_START, **receive_start_fields(target, policy, pdh, session)).handle
    driver.activate(target.machine, 0, target.handle, es=bool(policy & Policy.ES))


def receive_start_fields(target, policy, pdh, session):
    return {
        "policy": policy,
        "dh_spa": target.put(10, pdh),
        "dh_bytes": len(pdh),
        "session_spa": target.put(11, session),
        "session_bytes": len(session),
    }


def send(source, command, spa, length):
    """(header, packet) of one SEND_UPDATE."""
    source.need(
        command,
        handle=source.handle,
        header_spa=source.place(4),
        header_bytes=PacketHeader.SIZE,
        guest_spa=spa,
        guest_bytes=length,
        transport_spa=source.place(5),
        transport_bytes=length,
    )
    return driver.get(source.machine, source.place(4), PacketHeader.SIZE), driver.get(
        source.machine, source.place(5), length
    )


def receive_fields(target, spa, header, packet):
    return {
        "handle": target.handle,
        "header_spa": target.put(4, header),
        "header_bytes": len(header),
        "guest_spa": spa,
        "guest_bytes": len(packet),
        "transport_spa": target.put(5, packet),
        "transport_bytes": len(packet),
    }


def test_a_guest_moves_with_its_memory_and_its_vmsa(two):
    source, target = two
    start(source, target)
    for gpa in range(0, 4 * PAGE, PAGE):
        header, packet = send(source, Command.SEND_UPDATE_DATA, source.vm.memory_spa + gpa, PAGE)
        assert packet != source.machine.access.guest_physical_read(source.machine.vcpus[0], gpa, PAGE, c_bit=True)
        target.need(Command.RECEIVE_UPDATE_DATA, **receive_fields(target, target.vm.memory_spa + gpa, header, packet))
    header, packet = send(source, Command.SEND_UPDATE_VMSA, source.vmsa_spa, PAGE)
    target.need(Command.RECEIVE_UPDATE_VMSA, **receive_fields(target, target.vmsa_spa, header, packet))
    source.need(Command.SEND_FINISH, handle=source.handle)
    target.need(Command.RECEIVE_FINISH, handle=target.handle)

    views = [world.machine.access.guest_physical_read(world.machine.vcpus[0], 0, 4 * PAGE, c_bit=True) for world in two]
    assert views[0] == views[1]
    assert views[0][:PAGE] == PLAINTEXT
    cells = [world.machine.memory.dram(world.vm.memory_spa, PAGE) for world in two]
    assert cells[0] != cells[1]
    key = sev.sev_state(target.machine).guests[target.handle].key(target.machine)
    vmsa = target.machine.memory.read(target.vmsa_spa, PAGE, key)
    assert vmsa[:0x380] + vmsa[0x390:] == VMSA[:0x380] + VMSA[0x390:]
    states = [world.need(Command.GUEST_STATUS, handle=world.handle).state for world in two]
    assert states == [GuestState.SENT, GuestState.RUNNING]
    source.need(Command.DEACTIVATE, handle=source.handle)
    fields = {"handle": source.handle, "asid": 3}
    assert rejected(source.machine, Command.ACTIVATE, **fields) == Status.INVALID_GUEST_STATE


def test_the_moved_guest_may_move_on(two):
    source, target = two
    start(source, target)
    header, packet = send(source, Command.SEND_UPDATE_VMSA, source.vmsa_spa, PAGE)
    target.need(Command.RECEIVE_UPDATE_VMSA, **receive_fields(target, target.vmsa_spa, header, packet))
    target.need(Command.RECEIVE_FINISH, handle=target.handle)
    target.need(Command.SEND_START, **send_start_fields(target, source))
    send(target, Command.SEND_UPDATE_VMSA, target.vmsa_spa, PAGE)


def test_a_cancelled_move_leaves_the_guest_running_and_the_keys_forgotten(two):
    source, target = two
    source.need(Command.SEND_START, **send_start_fields(source, target))
    guest = sev.sev_state(source.machine).guests[source.handle]
    assert guest.keys != NO_KEYS
    source.need(Command.SEND_CANCEL, handle=source.handle)
    assert (guest.state, guest.keys) == (GuestState.RUNNING, NO_KEYS)


@pytest.mark.parametrize("place", [*range(0x34), 0x34, 0x34 + 2048, 0x34 + 4095])
def test_every_tampered_byte_of_a_packet_is_noticed(two, place):
    source, target = two
    start(source, target)
    packet = bytearray(b"".join(send(source, Command.SEND_UPDATE_DATA, source.vm.memory_spa, PAGE)))
    packet[place] ^= 0x80
    fields = receive_fields(target, target.vm.memory_spa, bytes(packet[:0x34]), bytes(packet[0x34:]))
    assert rejected(target.machine, Command.RECEIVE_UPDATE_DATA, **fields) == Status.BAD_MEASUREMENT


def test_a_packet_cut_short_or_from_another_session_is_refused(two):
    source, target = two
    start(source, target)
    header, packet = send(source, Command.SEND_UPDATE_DATA, source.vm.memory_spa, PAGE)
    fields = receive_fields(target, target.vm.memory_spa, header, packet[:-16])
    assert rejected(target.machine, Command.RECEIVE_UPDATE_DATA, **fields) == Status.BAD_MEASUREMENT
    foreign, sealed = crypto.seal_packet(KEYS, crypto.Context.DATA, packet, iv=bytes(16))
    fields = receive_fields(target, target.vm.memory_spa, foreign, sealed)
    assert rejected(target.machine, Command.RECEIVE_UPDATE_DATA, **fields) == Status.BAD_MEASUREMENT
    flagged, sealed = crypto.seal_packet(KEYS, crypto.Context.DATA, packet, iv=bytes(16), flags=1)
    fields = receive_fields(target, target.vm.memory_spa, flagged, sealed)
    assert rejected(target.machine, Command.RECEIVE_UPDATE_DATA, **fields) == Status.UNSUPPORTED


def test_a_tampered_session_starts_no_guest(two):
    source, target = two
    policy = source.need(Command.SEND_START, **send_start_fields(source, target)).policy
    good = driver.get(source.machine, source.place(9), Session.SIZE)
    pdh, _ = source.export()
    for bit in range(0, Session.SIZE * 8, 61):
        session = bytearray(good)
        session[bit // 8] ^= 1 << bit % 8
        fields = receive_start_fields(target, policy, pdh, bytes(session))
        assert rejected(target.machine, Command.RECEIVE_START, **fields) == Status.BAD_MEASUREMENT, bit


def test_the_policy_travels_under_its_mac(two):
    source, target = two
    source.need(Command.SEND_START, **send_start_fields(source, target))
    session = driver.get(source.machine, source.place(9), Session.SIZE)
    pdh, _ = source.export()
    fields = receive_start_fields(target, Policy.ES | Policy.NODBG, pdh, session)
    assert rejected(target.machine, Command.RECEIVE_START, **fields) == Status.BAD_MEASUREMENT


def test_a_vmsa_that_the_hypervisor_wrote_to_is_not_sent(two):
    source, target = two
    start(source, target)
    driver.put(source.machine, source.vmsa_spa + 0x20, b"not the CPU's!!!")
    fields = source.fields(Command.SEND_UPDATE_VMSA)
    assert rejected(source.machine, Command.SEND_UPDATE_VMSA, **fields) == Status.INVALID_PARAM


@pytest.mark.parametrize("two", [Policy(0)], indirect=True)
def test_a_guest_without_es_has_no_vmsa_to_send_or_receive(two):
    source, target = two
    start(source, target)
    assert rejected(source.machine, Command.SEND_UPDATE_VMSA, **source.fields(Command.SEND_UPDATE_VMSA)) == 0x15
    fields = receive_fields(target, target.vmsa_spa, bytes(0x34), bytes(PAGE))
    assert rejected(target.machine, Command.RECEIVE_UPDATE_VMSA, **fields) == Status.UNSUPPORTED


@pytest.mark.parametrize("two", [Policy.NOSEND], indirect=True)
def test_nosend_is_not_sent(two):
    source, target = two
    fields = send_start_fields(source, target)
    assert rejected(source.machine, Command.SEND_START, **fields) == Status.POLICY_FAILURE


@pytest.mark.parametrize("two", [Policy.SEV], indirect=True)
class TestSevPolicy:
    """The guest may go only to a platform whose whole chain leads to AMD."""

    def test_a_platform_with_the_full_chain_is_accepted(self, two):
        start(*two)

    @pytest.mark.parametrize("part", ["pdh", "pek", "cek", "amd"])
    def test_a_tampered_certificate_is_refused(self, two, part):
        source, target = two
        good = send_start_fields(source, target)
        place = {"pdh": (6, 0), "pek": (7, 0), "cek": (7, 2 * CERTIFICATE_BYTES), "amd": (10, 0)}[part]
        where = source.place(place[0]) + place[1] + 0x30
        byte = driver.get(source.machine, where, 1)
        driver.put(source.machine, where, bytes((byte[0] ^ 1,)))
        status = rejected(source.machine, Command.SEND_START, **good)
        assert status in {Status.BAD_SIGNATURE, Status.INVALID_CERTIFICATE}

    def test_the_cek_needs_amds_signature(self, two):
        source, target = two
        _, chain = target.export()
        unsigned = chain[2 * CERTIFICATE_BYTES :]
        fields = send_start_fields(source, target, cek=unsigned)
        assert rejected(source.machine, Command.SEND_START, **fields) == Status.INVALID_CERTIFICATE

    def test_a_chain_of_another_root_is_refused(self, two):
        source, target = two
        other = vendor_certificate("genoa", Usage.ASK).to_bytes() + vendor_certificate("genoa", Usage.ARK).to_bytes()
        fields = send_start_fields(source, target, amd=other)
        assert rejected(source.machine, Command.SEND_START, **fields) == Status.INVALID_CERTIFICATE

    @pytest.mark.parametrize("change", [{"platform_bytes": 1}, {"pdh_bytes": 1}, {"amd_bytes": 0x641}])
    def test_lengths_come_first(self, two, change):
        source, target = two
        fields = send_start_fields(source, target) | change
        assert rejected(source.machine, Command.SEND_START, **fields) == Status.INVALID_LENGTH


def test_the_receivers_firmware_must_be_as_new_as_the_policy_says(two):
    _, target = two
    newer = World(Policy.SEV | 1 << 16 | 56 << 24, seed=b"newer")
    newer.need(Command.SHUTDOWN)
    image = make_image("milan", (1, 60, 1))
    newer.need(Command.DOWNLOAD_FIRMWARE, spa=newer.put(4, image), length=len(image))
    sev.initialise(newer.machine, es=True)
    newer.reach(GuestState.RUNNING)
    fields = send_start_fields(newer, target)
    assert rejected(newer.machine, Command.SEND_START, **fields) == Status.POLICY_FAILURE


@pytest.mark.parametrize("two", [Policy.DOMAIN], indirect=True)
class TestDomainPolicy:
    """The guest may go only to platforms of the same owner."""

    def own(self, world, scalar):
        """Make the key `scalar` the platform's external owner."""
        if world.handle:
            sev.stop_guest(world.machine, world.guest)
        fields = owner_fields(world, scalar)
        world.need(Command.PEK_CERT_IMPORT, **fields)

    def test_another_owners_platform_is_refused(self, two):
        source, target = two
        fields = send_start_fields(source, target)
        assert rejected(source.machine, Command.SEND_START, **fields) == Status.POLICY_FAILURE

    def test_the_same_owners_platform_is_accepted(self, two):
        for world in two:
            self.own(world, 0xABCDEF)
        source, target = two
        source.reach(GuestState.RUNNING)
        start(source, target)


def owner_fields(world, scalar):
    """PEK_CERT_IMPORT by the owner `scalar`."""
    world.need(Command.PEK_CSR, spa=world.place(6), length=PAGE)
    csr = SevCertificate.from_bytes(driver.get(world.machine, world.place(6), CERTIFICATE_BYTES))
    unsigned = make_certificate(Usage.OCA, crypto.public_point(scalar), api=(1, 55))
    return {
        "pek_spa": world.put(6, signed_by(csr, Slot.FIRST, Usage.OCA, scalar).to_bytes()),
        "pek_bytes": CERTIFICATE_BYTES,
        "oca_spa": world.put(7, signed_by(unsigned, Slot.FIRST, Usage.OCA, scalar).to_bytes()),
        "oca_bytes": CERTIFICATE_BYTES,
    }


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"header_bytes": 0x33}, Status.INVALID_LENGTH),
        ({"guest_bytes": 0}, Status.INVALID_LENGTH),
        ({"guest_bytes": 24, "transport_bytes": 24}, Status.INVALID_LENGTH),
        ({"guest_bytes": 0x5010, "transport_bytes": 0x5010}, Status.INVALID_LENGTH),
        ({"transport_bytes": PAGE - 16}, Status.INVALID_LENGTH),
        ({"guest_spa": 8}, Status.INVALID_ADDRESS),
        ({"guest_spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"header_spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"transport_spa": 1 << 46}, Status.INVALID_ADDRESS),
    ],
)
def test_send_update_answers_the_first_thing_that_is_wrong(two, change, status):
    source, target = two
    start(source, target)
    fields = source.fields(Command.SEND_UPDATE_DATA) | change
    assert rejected(source.machine, Command.SEND_UPDATE_DATA, **fields) == status


def test_send_update_tells_the_header_it_needs_and_takes_more_room(two):
    source, target = two
    start(source, target)
    fields = source.fields(Command.SEND_UPDATE_DATA)
    reply = source.run(Command.SEND_UPDATE_DATA, **fields | {"header_bytes": 0})
    assert (reply.status, reply.buffer.header_bytes) == (Status.INVALID_LENGTH, 0x34)
    reply = source.run(Command.SEND_UPDATE_DATA, **fields | {"header_bytes": 0x100, "guest_bytes": 64})
    assert (reply.status, reply.buffer.header_bytes) == (Status.SUCCESS, 0x34)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"header_bytes": 0x33}, Status.INVALID_LENGTH),
        ({"guest_bytes": PAGE - 16}, Status.INVALID_LENGTH),
        ({"guest_bytes": 0, "transport_bytes": 0}, Status.INVALID_LENGTH),
        ({"guest_bytes": 0x5010, "transport_bytes": 0x5010}, Status.INVALID_LENGTH),
        ({"guest_spa": 8}, Status.INVALID_ADDRESS),
        ({"guest_spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"header_spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"transport_spa": 1 << 46}, Status.INVALID_ADDRESS),
    ],
)
def test_receive_update_answers_the_first_thing_that_is_wrong(two, change, status):
    source, target = two
    start(source, target)
    header, packet = send(source, Command.SEND_UPDATE_DATA, source.vm.memory_spa, PAGE)
    fields = receive_fields(target, target.vm.memory_spa, header, packet) | change
    assert rejected(target.machine, Command.RECEIVE_UPDATE_DATA, **fields) == status


def test_send_start_tells_the_session_it_needs_before_it_looks_at_the_state(two):
    source, target = two
    start(source, target)
    reply = source.run(Command.SEND_START, handle=source.handle)
    assert (reply.status, reply.buffer.session_bytes) == (Status.INVALID_LENGTH, 0x80)


def test_an_inactive_guest_is_neither_sent_nor_received(two):
    source, target = two
    start(source, target)
    for world in two:
        world.need(Command.DEACTIVATE, handle=world.handle)
    assert rejected(source.machine, Command.SEND_UPDATE_DATA, **source.fields(Command.SEND_UPDATE_DATA)) == 0x08
    fields = receive_fields(target, target.vm.memory_spa, bytes(0x34), bytes(PAGE))
    assert rejected(target.machine, Command.RECEIVE_UPDATE_DATA, **fields) == Status.INACTIVE
