"""Guest messages: order of checks, counters, reports, derived keys, TSC, CPUID, migration."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sevlab.core.testing import assert_offsets
from sevlab.plugins.sev import Command, Status, public_point
from sevlab.plugins.snp import driver, keys
from sevlab.plugins.snp.attestation import DerivedKeyContext, chip_id_of
from sevlab.plugins.snp.automata import SnpGuestState
from sevlab.plugins.snp.buffers import MetadataEntry
from sevlab.plugins.snp.chain import vcek_certificate, vlek_certificate
from sevlab.plugins.snp.cpuid_table import build_table
from sevlab.plugins.snp.messages import (
    EXPORT_BYTES,
    ExportContext,
    ExportRequest,
    ExportResponse,
    ImportRequest,
    KeyRequest,
    KeyResponse,
    MessageType,
    ReportRequest,
    ReportResponse,
    StatusResponse,
    TscInfoResponse,
    VmrkRequest,
    open_message,
    seal,
)
from sevlab.plugins.snp.report import AttestationReport, parse_report
from sevlab.plugins.snp.states import snp_state
from sevlab.plugins.snp.tcb import Tcb
from sevlab.plugins.snp.verify import report_signature_verifies
from sevlab.plugins.snp.x509 import parse_der

from tests.plugins.snp.support import ask, context, running, snp_machine
from tests.plugins.snp.test_commands import firmware_page, launching, refused

S = Status


@pytest.fixture(scope="module")
def shared():
    machine = snp_machine(2)
    guest = running(machine)
    machine.mark()
    return machine, guest


@pytest.fixture
def machine(shared):
    shared[0].reset()
    return shared[0]


@pytest.fixture
def guest(shared):
    return shared[1]


def talk(machine, guest, kind, payload, *, vmpck=0, version=1):
    """The payload of the firmware's answer to a message that must be taken."""
    state = context(machine, guest)
    count = state.message_counts[vmpck]
    message = seal(state.vmpcks[vmpck], payload, seqno=count + 1, kind=kind, vmpck=vmpck, version=version)
    status, response = ask(machine, guest, message)
    assert status == S.SUCCESS
    assert state.message_counts[vmpck] == count + 2
    answer = open_message(state.vmpcks[vmpck], response)
    assert (answer.header.msg_seqno, answer.header.msg_type) == (count + 2, kind + 1)
    return answer.payload


def report_of(machine, guest, **fields):
    payload = talk(machine, guest, MessageType.REPORT_REQ, ReportRequest.build(**fields))
    return ReportResponse.from_bytes(payload)


def test_layouts():
    assert_offsets(ExportContext, {"vmrk": (0xD0, 32), "policy": (0x228, 8), "id_block": (0x240, 0x60)}, 0x300)
    assert_offsets(DerivedKeyContext, {"measurement": (0x48, 32), "id_key_digest": (0x88, 32)}, 0xA8)


# The channel ----------------------------------------------------------------------------------------------------------


def good(machine, guest, **changes):
    fields = {"seqno": 1, "kind": 5, "vmpck": 0, "version": 1} | changes
    return seal(context(machine, guest).vmpcks[fields["vmpck"] & 3], ReportRequest.build(), **fields)


def flipped(message, offset, bit=1):
    return message[:offset] + bytes((message[offset] ^ bit,)) + message[offset + 1 :]


def request_fields(machine, guest):
    pages = driver.pages(machine)
    return {"gctx_spa": guest.gctx_spa, "request_spa": pages.input_spa, "response_spa": pages.output_spa}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        (lambda message: flipped(message, 0x30), S.INVALID_PARAM),
        (lambda message: flipped(message, 0x31), S.INVALID_PARAM),
        (lambda message: flipped(message, 0x32), S.INVALID_PARAM),
        (lambda message: flipped(message, 0x36), S.INVALID_PARAM),
        (lambda message: flipped(message, 0x37, 0x80), S.INVALID_PARAM),
        (lambda message: flipped(message, 0x3C, 4), S.INVALID_PARAM),
        (lambda message: flipped(message, 0x3C, 1), S.BAD_MEASUREMENT),
        (lambda message: flipped(message, 0x34, 2), S.BAD_MEASUREMENT),
        (lambda message: flipped(message, 0x00), S.BAD_MEASUREMENT),
        (lambda message: flipped(message, 0x20, 4), S.BAD_MEASUREMENT),
        (lambda message: flipped(message, 0x60), S.BAD_MEASUREMENT),
        (lambda message: flipped(message, 0x1F), S.SUCCESS),
        (lambda message: flipped(message, 0x28), S.SUCCESS),
    ],
)
def test_a_changed_message_is_refused_before_anything_changes(machine, guest, change, status):
    driver.put(machine, driver.pages(machine).input_spa, change(good(machine, guest)))
    if status:
        refused(machine, Command.SNP_GUEST_REQUEST, status, **request_fields(machine, guest))
    else:
        assert driver.run(machine, Command.SNP_GUEST_REQUEST, **request_fields(machine, guest)) == 0


@pytest.mark.parametrize(
    ("changes", "status"),
    [({"seqno": 2}, S.AEAD_OFLOW), ({"seqno": 3}, S.AEAD_OFLOW), ({"version": 2}, S.INVALID_PARAM)]
    + [({"kind": kind}, S.INVALID_PARAM) for kind in (0, 2, 19, 255)],
    ids=str,
)
def test_a_genuine_message_that_does_not_fit_is_refused(machine, guest, changes, status):
    driver.put(machine, driver.pages(machine).input_spa, good(machine, guest, **changes))
    refused(machine, Command.SNP_GUEST_REQUEST, status, **request_fields(machine, guest))


def test_the_counter_ends_before_it_overflows(machine, guest):
    state = context(machine, guest)
    state.message_counts = ((1 << 64) - 2, 0, 0, 0)
    assert ask(machine, guest, good(machine, guest, seqno=(1 << 64) - 1))[0] == S.AEAD_OFLOW
    state.message_counts = ((1 << 64) - 4, 0, 0, 0)
    assert ask(machine, guest, good(machine, guest, seqno=(1 << 64) - 3))[0] == S.SUCCESS


def test_pages_and_state_come_before_the_message(machine, guest):
    fields = request_fields(machine, guest)
    request = Command.SNP_GUEST_REQUEST
    refused(machine, request, S.INVALID_PAGE_STATE, **(fields | {"response_spa": 0x1000}))
    refused(machine, request, S.INVALID_PARAM, **(fields | {"response_spa": 0x1008}))
    refused(machine, request, S.INVALID_GUEST, **(fields | {"gctx_spa": 0x1000}))
    context(machine, guest).state = SnpGuestState.LAUNCH
    refused(machine, request, S.INVALID_GUEST_STATE, **fields)


def test_a_request_need_not_be_page_aligned_but_must_fit_its_page(machine, guest):
    spa = driver.pages(machine).input_spa
    message = good(machine, guest)
    driver.put(machine, spa + 0x100, message)
    fields = request_fields(machine, guest)
    assert driver.run(machine, Command.SNP_GUEST_REQUEST, **(fields | {"request_spa": spa + 0x100})) == 0
    driver.put(machine, spa + 0xF80, good(machine, guest, seqno=3)[:0x80])
    fields["request_spa"] = spa + 0xF80
    refused(machine, Command.SNP_GUEST_REQUEST, S.INVALID_PARAM, **fields)


def test_every_vmpck_counts_for_itself(machine, guest):
    for number in (0, 2, 2, 3):
        talk(machine, guest, MessageType.REPORT_REQ, ReportRequest.build(vmpl=3), vmpck=number)
    assert context(machine, guest).message_counts == (2, 0, 4, 2)


@settings(max_examples=60)
@given(raw=st.binary(min_size=0x60, max_size=0x100))
def test_any_bytes_are_answered_and_none_is_a_nonce_twice(shared, raw):
    machine, guest = shared
    machine.reset()
    assert ask(machine, guest, raw)[0] in (S.INVALID_PARAM, S.BAD_MEASUREMENT)


# Reports --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", ["milan", "genoa", "turin"])
@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_a_report_of_every_version_verifies_against_the_simulated_chain(generation, version):
    machine = snp_machine(generation=generation, options={"snp": {"report_version": version}})
    guest = running(machine, host_data=b"\x11" * 32)
    answer = report_of(machine, guest, report_data=b"r" * 64, vmpl=1)
    assert (answer.status, answer.report_size) == (S.SUCCESS, 0x4A0)
    report = parse_report(answer.report)
    state, platform = context(machine, guest), snp_state(machine).platform
    assert report.report_version == version
    assert (report.measurement, report.report_data, report.vmpl) == (state.launch_digest, b"r" * 64, 1)
    assert (report.host_data, report.report_id, report.policy) == (b"\x11" * 32, state.report_id, state.policy)
    assert report.reported_tcb == platform.reported_tcb
    scalar = keys.signing_scalar(keys.vcek_stick(machine, platform.reported_tcb))
    der = vcek_certificate(
        generation, public_point(scalar), tcb=Tcb.of(report.reported_tcb, generation), chip_id=chip_id_of(machine)
    )
    assert report_signature_verifies(report, parse_der(der))
    broken = report.replace(report_data=b"x" * 64)
    assert not report_signature_verifies(broken, parse_der(der))


def test_a_vlek_signs_once_it_is_loaded(machine, guest):
    platform = snp_state(machine).platform
    platform.vlek = keys.vlek_sticks(b"provider", platform.reported_tcb)[-48:]
    tcb = Tcb.of(platform.reported_tcb, "milan")
    vlek = vlek_certificate("milan", public_point(keys.signing_scalar(platform.vlek)), tcb=tcb, csp_id="provider")
    for key_sel, signer in ((0, 1), (1, 0), (2, 1)):
        report = AttestationReport.from_bytes(report_of(machine, guest, key_sel=key_sel).report)
        assert report.key_info >> 2 & 7 == signer
        assert report_signature_verifies(report, parse_der(vlek)) is (signer == 1)


def test_masks_hide_chip_and_signature(machine, guest):
    driver.need(machine, Command.SNP_CONFIG, mask_chip_id=1, mask_chip_key=1)
    report = AttestationReport.from_bytes(report_of(machine, guest).report)
    assert (report.chip_id, report.sig_r, report.key_info >> 2 & 7) == (bytes(64), bytes(72), 7)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"key_sel": 3}, S.INVALID_KEY),
        ({"key_sel": 2}, S.INVALID_KEY),
        ({"reserved_44": 1}, S.INVALID_PARAM),
        ({"reserved_48": b"\1" + bytes(23), "key_sel": 3}, S.INVALID_PARAM),
    ],
)
def test_a_wrong_wish_is_told_in_the_payload_and_the_counter_moves(machine, guest, fields, status):
    answer = report_of(machine, guest, **fields)
    assert (answer.status, answer.report_size, any(answer.report)) == (status, 0x4A0, False)


def test_a_vmpck_speaks_only_for_its_own_level_and_above(machine, guest):
    for vmpl, status in ((0, S.INVALID_PARAM), (1, S.INVALID_PARAM), (2, S.SUCCESS), (3, S.SUCCESS)):
        payload = talk(machine, guest, MessageType.REPORT_REQ, ReportRequest.build(vmpl=vmpl), vmpck=2)
        assert ReportResponse.from_bytes(payload).status == status


@pytest.mark.unverified
def test_the_hypervisor_gets_a_report_of_its_own(machine, guest):
    out = driver.pages(machine).output_spa
    fields = {"length": 0x18, "gctx_spa": guest.gctx_spa, "report_spa": out}
    driver.need(machine, Command.SNP_HV_REPORT_REQ, **fields)
    answer = ReportResponse.from_bytes(driver.get(machine, out, ReportResponse.SIZE))
    assert parse_report(answer.report).vmpl == 0xFFFF_FFFF
    refused(machine, Command.SNP_HV_REPORT_REQ, S.INVALID_KEY, key_sel=3, **fields)


# Derived keys ---------------------------------------------------------------------------------------------------------


def key_of(machine, guest, *, vmpck=0, **fields):
    payload = talk(machine, guest, MessageType.KEY_REQ, KeyRequest.build(**fields), vmpck=vmpck)
    return KeyResponse.from_bytes(payload)


def test_the_same_wish_gives_the_same_key_and_any_other_another(machine, guest):
    wish = {"guest_field_select": 0x3F, "vmpl": 1}
    first = key_of(machine, guest, **wish)
    assert first.status == 0
    assert first.key == key_of(machine, guest, **wish).key
    others = [
        key_of(machine, guest, **(wish | {"vmpl": 2})).key,
        key_of(machine, guest, **(wish | {"root_key_select": 1})).key,
        *(key_of(machine, guest, **(wish | {"guest_field_select": 0x3F ^ 1 << bit})).key for bit in range(6)),
    ]
    assert len({first.key, *others}) == len(others) + 1


def test_a_key_depends_on_the_chip_unless_its_root_is_the_vmrk(machine, guest):
    chip = key_of(machine, guest).key
    own = key_of(machine, guest, root_key_select=1).key
    machine.components["sev"].chip_key = bytes(32)
    assert key_of(machine, guest).key != chip
    assert key_of(machine, guest, root_key_select=1).key == own


def test_a_key_of_a_lower_tcb_is_another_and_a_higher_one_is_refused(machine, guest):
    committed = snp_state(machine).platform.committed_tcb
    field = {"guest_field_select": 1 << 5}
    now = key_of(machine, guest, tcb_version=committed, **field)
    lower = key_of(machine, guest, tcb_version=committed - 1, **field)
    assert now.status == lower.status == 0
    assert now.key != lower.key
    assert key_of(machine, guest, tcb_version=committed + 1, **field).status == S.INVALID_PARAM
    assert key_of(machine, guest, tcb_version=committed | 1 << 16, **field).status == S.INVALID_PARAM
    assert key_of(machine, guest, tcb_version=committed + 1).status == S.SUCCESS  # not selected, not looked at


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"reserved_0": 1}, S.INVALID_PARAM),
        ({"reserved_4": 1, "key_sel": 3}, S.INVALID_PARAM),
        ({"key_sel": 3}, S.INVALID_KEY),
        ({"key_sel": 2}, S.INVALID_KEY),
        ({"key_sel": 3, "root_key_select": 1}, S.SUCCESS),
        ({"guest_field_select": 1 << 6}, S.INVALID_PARAM),
        ({"guest_field_select": 1 << 63}, S.INVALID_PARAM),
        ({"guest_field_select": 1 << 4, "guest_svn": 0}, S.SUCCESS),
        ({"guest_field_select": 1 << 4, "guest_svn": 1}, S.INVALID_PARAM),
        ({"guest_svn": 1}, S.SUCCESS),
    ],
    ids=str,
)
def test_key_requests_are_checked(machine, guest, fields, status):
    assert key_of(machine, guest, **fields).status == status


def test_a_masked_or_disabled_chip_key_is_no_root(machine, guest):
    driver.need(machine, Command.SNP_CONFIG, mask_chip_key=1)
    assert key_of(machine, guest).status == S.INVALID_KEY
    driver.need(machine, Command.SNP_CONFIG)
    context(machine, guest).vcek_dis = True
    assert key_of(machine, guest).status == S.INVALID_KEY
    assert key_of(machine, guest, vmpck=2, vmpl=1, root_key_select=1).status == S.INVALID_PARAM


# TSC, CPUID -----------------------------------------------------------------------------------------------------------


def test_tsc_info(machine, guest):
    context(machine, guest).desired_tsc_khz = 2_000_000
    answer = TscInfoResponse.from_bytes(talk(machine, guest, MessageType.TSC_INFO_REQ, bytes(128)))
    assert answer.tsc_scale == -(-(2_000_000 << 32) // 99_800)
    assert answer.tsc_factor == 200
    answer = TscInfoResponse.from_bytes(talk(machine, guest, MessageType.TSC_INFO_REQ, bytes(127) + b"\1"))
    assert answer.status == S.INVALID_PARAM


@pytest.mark.unverified
def test_cpuid_message_corrects(machine, guest):
    truth = machine.cpuid(None, 0x8000_001F, 0)
    right = build_table(((0x8000_001F, 0, truth),), 64)
    assert talk(machine, guest, MessageType.CPUID_REQ, right)[:4] == bytes(4)
    wrong = build_table(((0x8000_001F, 0, (0xFFFF_FFFF, *truth[1:])),), 64)
    answer = talk(machine, guest, MessageType.CPUID_REQ, wrong)
    assert answer[0] == S.INVALID_PARAM
    assert answer[16:64] == right[16:64]
    assert talk(machine, guest, MessageType.CPUID_REQ, (99).to_bytes(4, "little") + bytes(60))[0] == S.INVALID_PARAM


# Migration ------------------------------------------------------------------------------------------------------------


def status_of(payload):
    return StatusResponse.from_bytes(payload[:16]).status


def import_of(exported, gctx=0, **changes):
    fields = {"gctx_spa": gctx, "gctx_size": EXPORT_BYTES, "gctx_version": 3, "context": exported} | changes
    return ImportRequest.build(**fields)


def export_of(machine, guest, gctx):
    payload = talk(machine, guest, MessageType.EXPORT_REQ, ExportRequest.build(gctx_spa=gctx))
    return ExportResponse.from_bytes(payload)


def test_a_guest_without_an_agent_exports_itself_by_vmpck0(machine, guest):
    answer = export_of(machine, guest, guest.gctx_spa)
    assert (answer.status, answer.gctx_size, answer.gctx_version) == (0, 0x300, 3)
    exported = ExportContext.from_bytes(answer.context)
    state = context(machine, guest)
    assert (exported.vmpck0, exported.report_id, exported.policy) == (state.vmpcks[0], state.report_id, state.policy)
    wish = ExportRequest.build(gctx_spa=guest.gctx_spa)
    payload = talk(machine, guest, MessageType.EXPORT_REQ, wish, vmpck=1)
    assert ExportResponse.from_bytes(payload).status == S.INVALID_GUEST
    assert export_of(machine, guest, 0x1000).status == S.INVALID_GUEST


def agent_and_child(machine, agent):
    gctx = firmware_page(machine)
    driver.need(machine, Command.SNP_GCTX_CREATE, page_spa=gctx)
    policy = driver.DEFAULT_POLICY | 1 << 18
    fields = {"policy": policy, "ma_en": 1, "ma_gctx_spa": agent.gctx_spa}
    driver.need(machine, Command.SNP_LAUNCH_START, gctx_spa=gctx, **fields)
    return gctx


def test_an_agent_sets_the_root_key_while_its_guest_is_launched(machine, guest):
    gctx = agent_and_child(machine, guest)
    wish = VmrkRequest.build(gctx_spa=gctx, vmrk=b"k" * 32)
    assert status_of(talk(machine, guest, MessageType.VMRK_REQ, wish)) == 0
    assert snp_state(machine).platform.guests[gctx].vmrk == b"k" * 32
    snp_state(machine).platform.guests[gctx].state = SnpGuestState.RUNNING
    assert status_of(talk(machine, guest, MessageType.VMRK_REQ, wish)) == S.INVALID_GUEST_STATE
    own = VmrkRequest.build(gctx_spa=guest.gctx_spa)
    assert status_of(talk(machine, guest, MessageType.VMRK_REQ, own)) == S.INVALID_GUEST
    assert export_of(machine, guest, gctx).status == 0


def test_import_needs_a_fresh_context_and_a_valid_root_entry(machine, guest):
    exported = export_of(machine, guest, guest.gctx_spa).context
    gctx = firmware_page(machine)
    driver.need(machine, Command.SNP_GCTX_CREATE, page_spa=gctx)
    send = lambda payload: status_of(talk(machine, guest, MessageType.IMPORT_REQ, payload))
    assert send(import_of(exported, gctx, gctx_version=2)) == S.INVALID_PARAM
    assert send(import_of(exported, gctx, gctx_size=0x2FF)) == S.INVALID_PARAM
    assert send(import_of(exported, guest.gctx_spa)) == S.INVALID_GUEST_STATE
    assert send(import_of(exported, 0x1000)) == S.INVALID_GUEST
    assert send(import_of(exported, gctx)) == S.INVALID_MDATA_ENTRY
    rooted = ExportContext.from_bytes(exported).replace(root_md_entry=MetadataEntry.build(valid=1)).to_bytes()
    assert send(import_of(rooted, gctx)) == S.SUCCESS
    copy = snp_state(machine).platform.guests[gctx]
    assert copy.state is SnpGuestState.RUNNING
    assert copy.vmpcks == context(machine, guest).vmpcks


def test_absorb_needs_the_same_migration_image(machine, guest):
    exported = ExportContext.from_bytes(export_of(machine, guest, guest.gctx_spa).context)
    target = launching(machine, imi_en=1)
    send = lambda raw: status_of(talk(machine, guest, MessageType.ABSORB_REQ, import_of(raw, target.gctx_spa)))
    assert send(exported.replace(imi_digest=b"x" * 48).to_bytes()) == S.BAD_MEASUREMENT
    digest = context(machine, target).launch_digest
    assert send(exported.replace(imi_digest=digest).to_bytes()) == S.SUCCESS
    assert context(machine, target).state is SnpGuestState.RUNNING
    assert send(exported.replace(imi_digest=digest).to_bytes()) == S.INVALID_GUEST_STATE


def test_absorb_without_an_agent_replaces_the_sender(machine, guest):
    exported = ExportContext.from_bytes(export_of(machine, guest, guest.gctx_spa).context)
    state = context(machine, guest)
    send = lambda raw: status_of(talk(machine, guest, MessageType.ABSORB_NOMA_REQ, import_of(raw)))
    assert send(exported.replace(imi_digest=b"x" * 48).to_bytes()) == S.BAD_MEASUREMENT
    state.imi_digest = state.launch_digest
    message = seal(
        state.vmpcks[0],
        import_of(exported.replace(imi_digest=state.launch_digest, report_id=b"n" * 32).to_bytes()),
        seqno=state.message_counts[0] + 1,
        kind=MessageType.ABSORB_NOMA_REQ,
        vmpck=0,
    )
    assert ask(machine, guest, message)[0] == S.SUCCESS
    assert state.report_id == b"n" * 32
    context(machine, guest).migration_agent_spa = 0x1000
