"""The guest owner against the simulated platform: session, measurement, secret, and what a tampering VMM gets."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.determinism import Entropy
from sevlab.core.errors import ConfigError, FormatError
from sevlab.core.machine import Machine
from sevlab.plugins.sev import Status, sev_state
from sevlab.plugins.sev.certificates import Usage, parse_certificate, usage_of
from sevlab.plugins.sev.driver import begin_launch, initialise, inject_secret, load, measure
from sevlab.plugins.sev.layout import Measurement
from sevlab.plugins.sev.owner import (
    TABLE_GUID,
    Expectation,
    SecretEntry,
    check_measurement,
    open_session,
    seal_secret,
    secret_table,
)

POLICY = 0x1
FIRMWARE = b"firmware" * 512


def entropy(seed=b"owner"):
    return Entropy(seed=seed)


@pytest.fixture
def machine():
    machine = Machine(MachineConfig(plugins=("sev",), guests=(GuestConfig(memory_bytes=1 << 20),)))
    initialise(machine, es=False)
    return machine


def launched(machine, *, firmware=FIRMWARE, policy=POLICY):
    pdh = parse_certificate(bytes(sev_state(machine).identity.pdh_certificate))
    session = open_session(pdh, POLICY, entropy())
    guest = begin_launch(
        machine, 0, policy=policy, dh_certificate=session.certificate.to_bytes(), session=session.session
    )
    vm = machine.hypervisor.vms[0]
    load(machine, vm, guest, 0x1000, firmware)
    return session, vm, measure(machine, guest)


def expected(machine, firmware=FIRMWARE):
    sev = sev_state(machine)
    return Expectation(sev.api_major, sev.api_minor, sev.build, POLICY, hashlib.sha256(firmware).digest())


def test_the_owner_opens_a_session_checks_the_measurement_and_sends_a_secret(machine):
    session, vm, guest = launched(machine)
    (check,) = check_measurement(session.keys.tik, guest.measurement, expected(machine))
    assert check.passed
    table = secret_table([("736869e5-84f0-4973-92ec-06879ce3da0b", b"passphrase")])
    packet = seal_secret(session.keys, guest.measurement, table, entropy())
    assert inject_secret(machine, vm, guest, 0x4000, packet) == Status.SUCCESS


def test_another_firmware_is_noticed(machine):
    session, _, guest = launched(machine, firmware=FIRMWARE[::-1])
    (check,) = check_measurement(session.keys.tik, guest.measurement, expected(machine))
    assert not check.passed
    assert check.got == guest.measurement[:32].hex()
    (right,) = check_measurement(session.keys.tik, guest.measurement, expected(machine, FIRMWARE[::-1]))
    assert right.passed


@pytest.mark.parametrize("field", ["api_major", "api_minor", "build", "policy"])
def test_each_part_of_the_expectation_counts(machine, field):
    session, _, guest = launched(machine)
    wanted = expected(machine)
    changed = wanted._replace(**{field: getattr(wanted, field) ^ 1})
    assert not check_measurement(session.keys.tik, guest.measurement, changed)[0].passed


@pytest.mark.parametrize("part", ["header", "payload", "measurement"])
def test_a_secret_that_was_changed_or_sealed_for_another_guest_is_refused(machine, part):
    session, vm, guest = launched(machine)
    measurement = guest.measurement
    if part == "measurement":
        measurement = bytes([measurement[0] ^ 1]) + measurement[1:]
    header, payload = seal_secret(session.keys, measurement, b"s" * 32, entropy())
    if part == "header":
        header = header[:-1] + bytes([header[-1] ^ 1])
    if part == "payload":
        payload = payload[:-1] + bytes([payload[-1] ^ 1])
    assert inject_secret(machine, vm, guest, 0x4000, (header, payload)) == Status.BAD_MEASUREMENT


def test_a_session_is_for_a_pdh_only(machine):
    pek = parse_certificate(bytes(sev_state(machine).identity.pek_certificate))
    with pytest.raises(ConfigError, match="session: expected a PDH certificate"):
        open_session(pek, POLICY, entropy())
    pdh = parse_certificate(bytes(sev_state(machine).identity.pdh_certificate))
    one, same, other = (open_session(pdh, POLICY, entropy(seed)) for seed in (b"a", b"a", b"b"))
    assert one == same
    assert one.keys != other.keys
    assert usage_of(one.certificate) is Usage.PDH
    assert parse_certificate(one.certificate.to_bytes()) == one.certificate


@pytest.mark.parametrize("length", [0, 47, 49])
def test_a_measurement_has_48_bytes(length):
    wanted = Expectation(1, 55, 21, 0, bytes(32))
    with pytest.raises(FormatError, match=f"measurement: offset 0x0, Measurement: expected 48 bytes, found {length}"):
        check_measurement(bytes(16), bytes(length), wanted)


@pytest.mark.parametrize("length", [0, 1, 15, 17])
def test_a_secret_is_whole_blocks(length):
    with pytest.raises(ConfigError, match=f"secret: {length} bytes, expected a positive multiple of 16"):
        seal_secret(None, bytes(Measurement.SIZE), bytes(length), entropy())


@given(st.lists(st.tuples(st.uuids(), st.binary(max_size=40)), max_size=4))
def test_any_secrets_can_be_read_back_from_their_table(secrets):
    table = secret_table((str(guid), data) for guid, data in secrets)
    assert len(table) % 16 == 0
    head = SecretEntry.from_bytes(table[:20])
    assert head.guid.hex() == "42f5741edd71664d963eef4287ff173b"
    assert TABLE_GUID.startswith("1e74f542")
    found, position = [], 20
    while position < head.length:
        entry = SecretEntry.from_bytes(table[position : position + 20])
        found.append((entry.guid, table[position + 20 : position + entry.length]))
        position += entry.length
    assert found == [(guid.bytes_le, data) for guid, data in secrets]
    assert not any(table[head.length :])
