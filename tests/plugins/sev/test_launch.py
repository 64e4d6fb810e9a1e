"""LAUNCH_* and ATTESTATION: sessions, MACs, policies, measurement, secrets, and the order of checks."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.events import Race
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, GuestState, Policy, Status, crypto, driver
from sevlab.plugins.sev.certificates import EcPublicKey, SevCertificate
from sevlab.plugins.sev.context import NO_KEYS
from sevlab.plugins.sev.crypto import Context
from sevlab.plugins.sev.layout import AttestationReport, Measurement, Session

from tests.plugins.sev.world import KEYS, OWNER_SCALAR, PAGE, PLAINTEXT, VMSA, World, rejected


@pytest.fixture(scope="module")
def fresh():
    made = World()
    made.machine.mark()
    return made


@pytest.fixture
def world(fresh):
    yield fresh
    fresh.machine.reset()


def guest_of(world):
    return sev.sev_state(world.machine).guests[world.handle]


def test_the_session_gives_the_firmware_the_owners_keys(world):
    world.handle = world.need(Command.LAUNCH_START, **world.start_fields()).handle
    assert guest_of(world).keys == KEYS
    assert guest_of(world).state is GuestState.LUPDATE


def test_without_a_session_the_policy_is_not_looked_at(world):
    world.handle = world.need(Command.LAUNCH_START, policy=0xFFFF_FFC0).handle
    assert guest_of(world).keys == NO_KEYS
    assert guest_of(world).policy == 0xFFFF_FFC0


@pytest.mark.parametrize("field", ["wrap_tk", "wrap_mac", "policy_mac", "nonce"])
@pytest.mark.parametrize("bit", [0, 7, 100, 127])
def test_each_bit_of_the_session_counts(world, field, bit):
    _, session = world.session(0)
    parsed = Session.from_bytes(session)
    value = bytearray(getattr(parsed, field))
    value[bit // 8] ^= 1 << bit % 8
    fields = world.start_fields(0) | {"session_spa": world.put(11, parsed.replace(**{field: bytes(value)}).to_bytes())}
    assert rejected(world.machine, Command.LAUNCH_START, **fields) == Status.BAD_MEASUREMENT
    assert rejected(world.machine, Command.RECEIVE_START, **fields) == Status.BAD_MEASUREMENT


def test_every_bit_of_the_macs_is_checked(world):
    _, session = world.session(0)
    shared = crypto.ecdh(sev.sev_state(world.machine).identity.pdh, crypto.public_point(OWNER_SCALAR))
    for bit in range(0x40 * 8, 0x80 * 8):
        flipped = bytearray(session)
        flipped[bit // 8] ^= 1 << bit % 8
        keys = crypto.unwrap_session(shared, Session.from_bytes(bytes(flipped)))
        wrap_broken, policy_broken = keys is None, not crypto.policy_mac_is_right(KEYS.tik, 0, bytes(flipped[0x60:]))
        assert (wrap_broken, policy_broken) == (bit < 0x60 * 8, bit >= 0x60 * 8), f"bit {bit}"


def test_the_wrap_iv_is_not_covered_by_the_wrap_mac_but_by_the_policy_mac(world):
    """Another IV gives other keys; only that the TIK changes makes the policy's MAC fail."""
    _, session = world.session(0)
    parsed = Session.from_bytes(session)
    changed = parsed.replace(wrap_iv=bytes(16))
    shared = crypto.ecdh(sev.sev_state(world.machine).identity.pdh, crypto.public_point(OWNER_SCALAR))
    assert crypto.unwrap_session(shared, changed) not in {None, KEYS}
    fields = world.start_fields(0) | {"session_spa": world.put(11, changed.to_bytes())}
    assert rejected(world.machine, Command.LAUNCH_START, **fields) == Status.BAD_MEASUREMENT


def test_the_policy_that_the_owner_signed_is_the_only_one(world):
    fields = world.start_fields(Policy.NODBG) | {"policy": 0}
    assert rejected(world.machine, Command.LAUNCH_START, **fields) == Status.BAD_MEASUREMENT


@pytest.mark.parametrize(
    ("policy", "status"),
    [
        (1 << 16 | 55 << 24, Status.SUCCESS),
        (1 << 16 | 56 << 24, Status.POLICY_FAILURE),
        (2 << 16, Status.POLICY_FAILURE),
        (0 << 16 | 255 << 24, Status.SUCCESS),
        (1 << 5, Status.SUCCESS),
        (1 << 6, Status.POLICY_FAILURE),
        (1 << 15, Status.POLICY_FAILURE),
    ],
)
def test_the_policys_version_and_reserved_bits(world, policy, status):
    fields = world.start_fields(policy)
    assert world.run(Command.LAUNCH_START, **fields).status == status


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"session_bytes": 0x7F}, Status.INVALID_LENGTH),
        ({"session_bytes": 0x81}, Status.INVALID_LENGTH),
        ({"dh_bytes": 0x823}, Status.INVALID_LENGTH),
        ({"session_spa": 1 << 45}, Status.INVALID_ADDRESS),
        ({"dh_spa": 1 << 45}, Status.INVALID_ADDRESS),
        ({"handle": 5}, Status.INVALID_GUEST),
        ({"session_bytes": 0, "dh_bytes": 0, "handle": 5}, Status.INVALID_LENGTH),
        ({"session_spa": 1 << 45, "dh_bytes": 0}, Status.INVALID_ADDRESS),
        ({"policy": 0xFFC0, "handle": 5}, Status.BAD_MEASUREMENT),
    ],
)
def test_launch_start_answers_the_first_thing_that_is_wrong(world, change, status):
    assert rejected(world.machine, Command.LAUNCH_START, **world.start_fields(0) | change) == status


@pytest.mark.parametrize(
    "change",
    [
        {"certificate_version": 2},
        {"pubkey_usage": 0x1002},
        {"pubkey_algo": 2},
        {"pubkey": EcPublicKey.build(curve=1, qx=bytes(72), qy=bytes(72))},
        {"pubkey": EcPublicKey.build(curve=2, qx=bytes(72), qy=bytes(72))},
        {"pubkey": EcPublicKey.build(curve=2, qx=b"\1".ljust(72, b"\0"), qy=b"\1".ljust(72, b"\0"))},
        {"pubkey": EcPublicKey.build(curve=2, qx=b"\xff" * 72, qy=b"\xff" * 72)},
    ],
)
def test_a_key_that_is_no_pdh_or_off_the_curve_opens_no_session(world, change):
    certificate, _ = world.session(0)
    forged = SevCertificate.from_bytes(certificate).replace(**change).to_bytes()
    fields = world.start_fields(0) | {"dh_spa": world.put(10, forged)}
    assert rejected(world.machine, Command.LAUNCH_START, **fields) == Status.INVALID_CERTIFICATE


@given(st.integers(0, (1 << 384) - 1), st.integers(0, (1 << 384) - 1))
def test_random_points_are_off_the_curve(x, y):
    assert crypto.ecdh(7, crypto.Point(x, y)) is None


def test_the_measurement_is_over_the_plaintext_in_order(world):
    world.reach(GuestState.LSECRET)
    guest = guest_of(world)
    assert guest.launch_digest == hashlib.sha256(PLAINTEXT + VMSA).digest()
    data = Measurement.from_bytes(driver.get(world.machine, world.place(6), 0x30))
    assert data.measure == guest.measure
    assert data.measure == crypto.launch_measure(
        KEYS.tik,
        api=(1, 55),
        build=21,
        policy=world.policy,
        launch_digest=guest.launch_digest,
        mnonce=data.mnonce,
    )


@pytest.mark.parametrize("lengths", [(16,), (4096,), (16, 48, 4096 * 3 + 32), (0x6000, 0x10)])
def test_loads_of_any_size_are_measured_and_encrypted(world, lengths):
    guest = sev.begin_launch(world.machine, 0)
    spa, total = world.vm.memory_spa + 16, b""
    for number, length in enumerate(lengths):
        data = bytes((number + 1,)) * length
        driver.put(world.machine, spa + len(total), data)
        world.need(Command.LAUNCH_UPDATE_DATA, handle=guest.handle, spa=spa + len(total), length=length)
        total += data
    assert world.machine.access.guest_physical_read(world.machine.vcpus[0], 16, len(total), c_bit=True) == total
    assert sev.sev_state(world.machine).guests[guest.handle].digest.digest() == hashlib.sha256(total).digest()


def test_a_page_under_the_hosts_key_can_be_loaded_by_its_c_bit(world):
    guest = sev.begin_launch(world.machine, 0)
    spa = world.vm.memory_spa
    world.machine.access.hypervisor_write(spa, PLAINTEXT, c_bit=True)
    c_bit = 1 << world.machine.config.part.c_bit
    world.need(Command.LAUNCH_UPDATE_DATA, handle=guest.handle, spa=spa | c_bit, length=PAGE)
    assert world.machine.access.guest_physical_read(world.machine.vcpus[0], 0, PAGE, c_bit=True) == PLAINTEXT


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"spa": 8}, Status.INVALID_ADDRESS),
        ({"length": 0}, Status.INVALID_LENGTH),
        ({"length": 24}, Status.INVALID_LENGTH),
        ({"spa": 8, "length": 0}, Status.INVALID_ADDRESS),
        ({"spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"handle": 9, "length": 0}, Status.INVALID_GUEST),
    ],
)
def test_launch_update_data_answers_the_first_thing_that_is_wrong(world, change, status):
    world.reach(GuestState.LUPDATE)
    fields = world.fields(Command.LAUNCH_UPDATE_DATA) | change
    assert rejected(world.machine, Command.LAUNCH_UPDATE_DATA, **fields) == status


def test_launch_update_vmsa_looks_at_its_length_first_of_all(world):
    world.need(Command.SHUTDOWN)
    fields = {"handle": 9, "spa": 8, "length": 4080}
    assert rejected(world.machine, Command.LAUNCH_UPDATE_VMSA, **fields) == Status.INVALID_LENGTH
    assert (
        rejected(world.machine, Command.LAUNCH_UPDATE_VMSA, **fields | {"length": PAGE})
        == Status.INVALID_PLATFORM_STATE
    )


def test_a_guest_without_es_has_no_vmsa(world):
    guest = sev.begin_launch(world.machine, 0)
    fields = {"handle": guest.handle, "spa": world.vmsa_spa, "length": PAGE}
    assert rejected(world.machine, Command.LAUNCH_UPDATE_VMSA, **fields) == Status.UNSUPPORTED


def test_the_loaded_vmsa_holds_the_address_of_its_checksum(world):
    world.reach(GuestState.LSECRET)
    guest, tmr = guest_of(world), sev.sev_state(world.machine).tmr
    page = world.machine.memory.read(world.vmsa_spa, PAGE, guest.key(world.machine))
    assert page[0x380:0x388] == bytes(8)
    slot = int.from_bytes(page[0x388:0x390], "little")
    assert tmr.spa + tmr.length_bytes // 2 <= slot < tmr.spa + tmr.length_bytes
    assert page[:0x380] + page[0x390:] == VMSA[:0x380] + VMSA[0x390:]
    assert (slot,) == guest.vmsa_slots


def test_an_inactive_guest_cannot_be_loaded(world):
    handle = world.need(Command.LAUNCH_START, policy=0).handle
    fields = {"handle": handle, "spa": world.vm.memory_spa, "length": 16}
    assert rejected(world.machine, Command.LAUNCH_UPDATE_DATA, **fields) == Status.INACTIVE


def test_es_needs_a_platform_with_es(world):
    world.need(Command.SHUTDOWN)
    world.need(Command.INIT)
    assert rejected(world.machine, Command.LAUNCH_START, policy=Policy.ES) == Status.UNSUPPORTED


def test_a_key_is_shared_only_with_the_same_policy_that_allows_it(world):
    first = world.need(Command.LAUNCH_START, policy=0).handle
    second = world.need(Command.LAUNCH_START, policy=0, handle=first).handle
    guests = sev.sev_state(world.machine).guests
    assert guests[first].vek_seed == guests[second].vek_seed
    assert rejected(world.machine, Command.LAUNCH_START, policy=1, handle=first) == Status.POLICY_FAILURE
    closed = world.need(Command.LAUNCH_START, policy=Policy.NOKS).handle
    assert rejected(world.machine, Command.LAUNCH_START, policy=Policy.NOKS, handle=closed) == Status.POLICY_FAILURE


def test_there_are_1024_handles(world):
    for number in range(1, 1025):
        assert world.need(Command.LAUNCH_START, policy=0).handle == number
    assert rejected(world.machine, Command.LAUNCH_START, policy=0) == Status.RESOURCE_LIMIT
    world.need(Command.DECOMMISSION, handle=7)
    assert world.need(Command.LAUNCH_START, policy=0).handle == 7


def test_launch_measure_tells_the_length_it_needs(world):
    world.reach(GuestState.LUPDATE)
    reply = world.run(Command.LAUNCH_MEASURE, handle=world.handle, length=0)
    assert (reply.status, reply.buffer.length) == (Status.INVALID_LENGTH, 0x30)
    world.need(Command.LAUNCH_MEASURE, **world.fields(Command.LAUNCH_MEASURE))
    reply = world.run(Command.LAUNCH_MEASURE, handle=world.handle, length=0)
    assert (reply.status, reply.buffer.length) == (Status.INVALID_GUEST_STATE, 0)


def test_a_secret_arrives_in_guest_memory_and_may_be_followed_by_another(world):
    world.reach(GuestState.LSECRET)
    for number in range(2):
        fields = world.fields(Command.LAUNCH_SECRET) | {"guest_spa": world.vm.memory_spa + number * 64}
        world.need(Command.LAUNCH_SECRET, **fields)
    memory = world.machine.access.guest_physical_read(world.machine.vcpus[0], 0, 128, c_bit=True)
    assert memory == PLAINTEXT[:64] * 2


def test_every_byte_of_a_secrets_header_counts(world):
    world.reach(GuestState.LSECRET)
    fields = world.fields(Command.LAUNCH_SECRET)
    good = driver.get(world.machine, fields["header_spa"], 0x34)
    for place in range(0x34):
        header = bytearray(good)
        header[place] ^= 0x10
        world.put(4, bytes(header))
        assert rejected(world.machine, Command.LAUNCH_SECRET, **fields) == Status.BAD_MEASUREMENT, place


def test_a_secret_for_another_measure_or_in_another_context_is_refused(world):
    world.reach(GuestState.LSECRET)
    base = world.fields(Command.LAUNCH_SECRET)
    for context, measure in ((Context.LAUNCH_SECRET, bytes(32)), (Context.DATA, guest_of(world).measure)):
        fields = base | world.packet(context, PLAINTEXT[:64], measure)
        assert rejected(world.machine, Command.LAUNCH_SECRET, **fields) == Status.BAD_MEASUREMENT


def test_a_compressed_secret_is_authentic_and_unsupported(world):
    world.reach(GuestState.LSECRET)
    guest = guest_of(world)
    header, ciphertext = crypto.seal_packet(
        KEYS, Context.LAUNCH_SECRET, PLAINTEXT[:64], iv=bytes(16), measure=guest.measure, flags=1
    )
    fields = world.fields(Command.LAUNCH_SECRET)
    world.put(4, header)
    world.put(5, ciphertext)
    assert rejected(world.machine, Command.LAUNCH_SECRET, **fields) == Status.UNSUPPORTED


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"guest_spa": 8}, Status.INVALID_ADDRESS),
        ({"header_bytes": 0x35}, Status.INVALID_LENGTH),
        ({"header_bytes": 0x33}, Status.INVALID_LENGTH),
        ({"guest_bytes": 0, "transport_bytes": 0}, Status.INVALID_LENGTH),
        ({"guest_bytes": 0x5010, "transport_bytes": 0x5010}, Status.INVALID_LENGTH),
        ({"guest_bytes": 48}, Status.INVALID_LENGTH),
        ({"guest_bytes": 65, "transport_bytes": 65}, Status.INVALID_LENGTH),
        ({"header_spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"transport_spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"guest_spa": 1 << 46}, Status.INVALID_ADDRESS),
    ],
)
def test_launch_secret_answers_the_first_thing_that_is_wrong(world, change, status):
    world.reach(GuestState.LSECRET)
    fields = world.fields(Command.LAUNCH_SECRET) | change
    assert rejected(world.machine, Command.LAUNCH_SECRET, **fields) == status


def test_alignment_and_lengths_of_a_secret_come_before_the_guests_state(world):
    world.reach(GuestState.RUNNING)
    fields = world.fields(Command.LAUNCH_SECRET)
    assert rejected(world.machine, Command.LAUNCH_SECRET, **fields | {"guest_spa": 8}) == Status.INVALID_ADDRESS
    assert rejected(world.machine, Command.LAUNCH_SECRET, **fields | {"guest_bytes": 1}) == Status.INVALID_LENGTH
    assert rejected(world.machine, Command.LAUNCH_SECRET, **fields) == Status.INVALID_GUEST_STATE


def test_after_the_launch_the_owners_keys_are_gone(world):
    world.reach(GuestState.RUNNING)
    guest = guest_of(world)
    assert (guest.keys, guest.measure, guest.nonce) == (NO_KEYS, bytes(32), bytes(16))
    assert guest.launch_digest == hashlib.sha256(PLAINTEXT + VMSA).digest()


def test_a_guest_may_be_launched_without_an_asid_and_activated_later(world):
    handle = world.need(Command.LAUNCH_START, policy=0).handle
    world.need(Command.LAUNCH_MEASURE, handle=handle, spa=world.place(6), length=0x30)
    world.need(Command.LAUNCH_FINISH, handle=handle)
    driver.flush(world.machine)
    world.need(Command.ACTIVATE, handle=handle, asid=200)
    assert sev.sev_state(world.machine).ccxs[0].in_use >> 200 & 1


def test_the_attestation_report_is_signed_by_the_pek(world):
    world.reach(GuestState.RUNNING)
    world.need(Command.ATTESTATION, **world.fields(Command.ATTESTATION))
    data = driver.get(world.machine, world.place(6), 0xD0)
    report = AttestationReport.from_bytes(data)
    assert report.launch_digest == hashlib.sha256(PLAINTEXT + VMSA).digest()
    assert (report.policy, report.mnonce) == (Policy.ES, b"caller's nonce 1")
    assert (report.signature_usage, report.signature_algorithm) == (0x1002, 2)
    point = crypto.public_point(sev.sev_state(world.machine).identity.pek)
    signature = int.from_bytes(report.signature_r, "little"), int.from_bytes(report.signature_s, "little")
    assert crypto.ecdsa_verify(point, data[:0x34], signature)
    assert not crypto.ecdsa_verify(point, data[:0x33] + b"\1", signature)


def test_attestation_tells_the_length_it_needs(world):
    world.reach(GuestState.RUNNING)
    reply = world.run(Command.ATTESTATION, handle=world.handle, length=0xCF)
    assert (reply.status, reply.buffer.length) == (Status.INVALID_LENGTH, 0xD0)


def test_a_race_between_hash_and_encryption_changes_neither(world):
    """The firmware fetches what it loads once: what another CPU writes meanwhile is either in both or in none."""
    guest = sev.begin_launch(world.machine, 0)
    spa = world.vm.memory_spa
    driver.put(world.machine, spa, PLAINTEXT)
    world.machine.apply(Race(2, spa, b"from another CPU"))
    world.need(Command.LAUNCH_UPDATE_DATA, handle=guest.handle, spa=spa, length=PAGE)
    memory = world.machine.access.guest_physical_read(world.machine.vcpus[0], 0, PAGE, c_bit=True)
    assert memory[:16] == b"from another CPU"
    assert sev.sev_state(world.machine).guests[guest.handle].digest.digest() == hashlib.sha256(memory).digest()
