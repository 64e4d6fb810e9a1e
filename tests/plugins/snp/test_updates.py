"""Live updates of the firmware, commitment, mitigations, and keys that name them."""

from __future__ import annotations

import pytest
from sevlab.plugins.sev import Command, Status, firmware, sev_state
from sevlab.plugins.snp import driver
from sevlab.plugins.snp.attestation import GuestField
from sevlab.plugins.snp.buffers import FeatureInfoOutput, MitigationResult
from sevlab.plugins.snp.driver import LaunchPage
from sevlab.plugins.snp.guest_pages import SecretsPage
from sevlab.plugins.snp.launch_digest import PageType
from sevlab.plugins.snp.messages import (
    KeyRequest,
    KeyRequestTail,
    KeyResponse,
    MessageType,
    ReportRequest,
    ReportResponse,
    open_message,
    seal,
)
from sevlab.plugins.snp.report import parse_report
from sevlab.plugins.snp.states import snp_state
from sevlab.plugins.snp.tcb import Tcb

from tests.plugins.snp.support import ask, context, running, snp_machine
from tests.plugins.snp.test_commands import refused

S = Status
UPDATE = Command.SNP_DOWNLOAD_FIRMWARE_EX
MITIGATE = Command.SNP_VERIFY_MITIGATION


# Live updates ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared():
    return snp_machine()


@pytest.fixture
def machine(shared):
    shared.reset()
    return shared


def place(machine, image):
    """The image in memory, as fields of the command."""
    spa = machine.hypervisor.allocate_pages(-(-len(image) // 4096))
    driver.put(machine, spa, image)
    return {"length": 0x18, "firmware_spa": spa, "firmware_bytes": len(image)}


def levels(machine):
    platform = snp_state(machine).platform
    tcbs = (platform.current_tcb, platform.committed_tcb, platform.reported_tcb)
    return tuple(Tcb.of(raw, machine.config.part.name).snp for raw in tcbs)


def test_an_update_is_current_and_not_committed_until_that_is_asked(machine):
    old = levels(machine)[0]
    running(machine)
    image = firmware.make_image("milan", (1, 0x40, 9), patch_level=old + 1)
    assert driver.run(machine, UPDATE, **place(machine, image)) == S.SUCCESS
    sev = sev_state(machine)
    assert (sev.api_major, sev.api_minor, sev.build) == (1, 0x40, 9)
    assert levels(machine) == (old + 1, old, old)
    assert snp_state(machine).platform.committed_version != (1, 0x40, 9)
    driver.need(machine, Command.SNP_COMMIT, length=4)
    assert levels(machine) == (old + 1,) * 3
    assert snp_state(machine).platform.committed_version == (1, 0x40, 9)
    assert len(snp_state(machine).platform.guests) == 1  # the guests live on


def test_an_update_can_commit_at_once_and_goes_back_only_until_then(machine):
    old = levels(machine)[0]
    newer = place(machine, firmware.make_image("milan", (1, 0x40, 9), patch_level=old + 1))
    older = place(machine, firmware.make_image("milan", (1, 0x37, 255), patch_level=old))
    assert driver.run(machine, UPDATE, **newer) == S.SUCCESS
    assert driver.run(machine, UPDATE, **older) == S.SUCCESS
    assert levels(machine) == (old,) * 3
    assert driver.run(machine, UPDATE, commit=1, **newer) == S.SUCCESS
    assert levels(machine) == (old + 1,) * 3
    refused(machine, UPDATE, S.BAD_SVN, **older)


@pytest.mark.parametrize(
    ("version", "level", "status"),
    [((1, 0x60, 0), -1, S.BAD_SVN), ((1, 0x36, 255), 0, S.BAD_VERSION), ((0, 255, 255), 0, S.BAD_VERSION)],
)
def test_an_image_is_not_older_than_what_is_committed(machine, version, level, status):
    image = firmware.make_image("milan", version, patch_level=levels(machine)[1] + level)
    refused(machine, UPDATE, status, **place(machine, image))


def test_an_image_is_the_vendor_s_whole_and_aligned(machine):
    image = firmware.make_image("milan", (1, 0x40, 9), patch_level=levels(machine)[0])
    fields = place(machine, image)
    refused(machine, UPDATE, S.INVALID_PARAM, **(fields | {"length": 0x17}))
    refused(machine, UPDATE, S.INVALID_PARAM, reserved_4=1, **fields)
    refused(machine, UPDATE, S.INVALID_ADDRESS, **(fields | {"firmware_spa": fields["firmware_spa"] + 16}))
    refused(machine, UPDATE, S.INVALID_ADDRESS, **(fields | {"firmware_spa": 1 << 40}))
    refused(machine, UPDATE, S.INVALID_LENGTH, **(fields | {"firmware_bytes": 0}))
    for number in (0x10, 0x60, 0x4C, 0x200, len(image) - 1):
        broken = image[:number] + bytes((image[number] ^ 1,)) + image[number + 1 :]
        refused(machine, UPDATE, S.BAD_SIGNATURE, **place(machine, broken))
    refused(machine, UPDATE, S.BAD_SIGNATURE, **place(machine, image[:-1]))
    driver.need(machine, Command.SNP_COMMIT, length=4)


def test_legacy_sev_must_be_uninitialised(machine):
    from sevlab.plugins import sev

    fields = place(machine, firmware.make_image("milan", (1, 0x40, 9), patch_level=levels(machine)[0]))
    sev.need(machine, Command.INIT)
    refused(machine, UPDATE, S.INVALID_PLATFORM_STATE, **fields)


# Mitigations ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def newer():
    return snp_machine(options={"snp": {"report_version": 5, "mitigations": 0b1011}})


@pytest.fixture
def late(newer):
    newer.reset()
    return newer


def verify(machine, subcommand, vector=0):
    out = driver.pages(machine).output_spa
    fields = {"length": 0x40, "subcommand": subcommand, "vector": vector, "dst_en": 1, "dst_spa": out}
    assert driver.run(machine, MITIGATE, **fields) == S.SUCCESS
    result = MitigationResult.from_bytes(driver.get(machine, out, MitigationResult.SIZE))
    return result.verified, result.supported, result.failure_status


def test_old_firmware_knows_no_mitigations(machine, late):
    refused(machine, MITIGATE, S.INVALID_COMMAND, length=0x40)
    for chosen, bit in ((machine, 0), (late, 1)):
        out = driver.pages(chosen).output_spa
        driver.need(chosen, Command.SNP_FEATURE_INFO, length=0x10, ecx_in=0, feature_info_spa=out)
        assert FeatureInfoOutput.from_bytes(driver.get(chosen, out, 16)).ecx >> 13 & 1 == bit


@pytest.mark.unverified
def test_supported_mitigations_are_verified_when_asked(late):
    assert verify(late, 0) == (0, 0b1011, 0)
    assert verify(late, 1, 0b0010) == (0b0010, 0b1011, 0)
    assert verify(late, 1, 0b0100) == (0b0010, 0b1011, 1)
    assert verify(late, 1, 0b0110) == (0b0010, 0b1011, 1)
    assert verify(late, 1) == (0b0010, 0b1011, 1)
    assert verify(late, 1, 0b1001) == (0b1011, 0b1011, 0)
    assert driver.run(late, MITIGATE, length=0x40) == S.SUCCESS  # nowhere to write to


@pytest.mark.unverified
@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"length": 0x3F}, S.INVALID_PARAM),
        ({"subcommand": 2}, S.INVALID_PARAM),
        ({"src_en": 1}, S.INVALID_PARAM),
        ({"reserved_6": 1}, S.INVALID_PARAM),
        ({"dst_en": 1, "dst_spa": 0x1000}, S.INVALID_PAGE_STATE),
        ({"dst_en": 1, "dst_spa": 1 << 40}, S.INVALID_ADDRESS),
        ({"subcommand": 1, "vector": 1, "dst_en": 1, "dst_spa": 0x1000}, S.INVALID_PAGE_STATE),
    ],
    ids=str,
)
def test_verify_mitigation_checks_its_buffer(late, fields, status):
    refused(late, MITIGATE, status, **({"length": 0x40} | fields))


SECRETS_GPA = 0x3000


def message(machine, guest, kind, payload, *, version=1):
    """(status, the answer's payload) of a message under VMPCK0."""
    key, count = context(machine, guest).vmpcks[0], context(machine, guest).message_counts[0]
    sealed = seal(key, payload, seqno=count + 1, kind=kind, vmpck=0, version=version)
    status, raw = ask(machine, guest, sealed)
    return status, b"" if status else open_message(key, raw).payload


def test_a_guest_knows_what_was_verified_at_its_launch_and_its_report_also_what_is_now(late):
    verify(late, 1, 0b0001)
    guest = running(late, pages=(LaunchPage(SECRETS_GPA, PageType.SECRETS),))
    verify(late, 1, 0b0010)
    late.vcpus[0].vmcb.guest_asid = guest.asid
    page = late.access.guest_physical_read(late.vcpus[0], SECRETS_GPA, 4096, c_bit=True)
    assert SecretsPage.from_bytes(page).launch_mit_vector == 0b0001
    status, payload = message(late, guest, MessageType.REPORT_REQ, ReportRequest.build())
    assert status == 0
    report = parse_report(ReportResponse.from_bytes(payload).report)
    assert (report.launch_mit_vector, report.current_mit_vector) == (0b0001, 0b0011)


def key(machine, guest, vector, *, fields=GuestField.LAUNCH_MIT_VECTOR, version=2):
    payload = (
        KeyRequest.build(guest_field_select=int(fields)) + KeyRequestTail.build(launch_mit_vector=vector) + bytes(8)
    )
    status, raw = message(machine, guest, MessageType.KEY_REQ, payload, version=version)
    assert status == 0
    return KeyResponse.from_bytes(raw)


@pytest.mark.unverified
def test_a_key_of_version_2_names_mitigations_of_the_launch(late):
    verify(late, 1, 0b0011)
    guest = running(late)
    keys = {vector: key(late, guest, vector).key for vector in (0, 1, 2, 3)}
    assert len(set(keys.values())) == 4
    assert key(late, guest, 1).key == keys[1]
    assert key(late, guest, 0b1000).status == S.INVALID_PARAM
    plain = key(late, guest, 0b1000, fields=0)  # not selected, not looked at
    assert (plain.status, plain.key) == (0, key(late, guest, 0, fields=0, version=1).key)
    assert key(late, guest, 1, version=1).status == S.INVALID_PARAM
    assert key(late, guest, 1, fields=1 << 7).status == S.INVALID_PARAM


def test_old_firmware_takes_no_message_of_version_2(machine, late):
    guest = running(machine)
    assert message(machine, guest, MessageType.KEY_REQ, bytes(48), version=2)[0] == S.INVALID_PARAM
    guest = running(late)
    assert message(late, guest, MessageType.KEY_REQ, bytes(48), version=3)[0] == S.INVALID_PARAM
    assert message(late, guest, MessageType.REPORT_REQ, bytes(96), version=2)[0] == S.INVALID_PARAM
