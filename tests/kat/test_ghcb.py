"""GHCB and VMSA layouts, constants and MSR-protocol values against other implementations."""

from __future__ import annotations

import re

import pytest
from sevlab.core.exitinfo import IOIO_IN, IOIO_REP, IOIO_STRING, EventWord, IoioInfo
from sevlab.core.layout_tools import validate
from sevlab.core.svm import EventType, ExitCode
from sevlab.plugins.sev import Command, GuestState, PlatformState, Status, buffers
from sevlab.plugins.sev_es import (
    MSR_GHCB,
    MSR_SEV_STATUS,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    SHARED_BUFFER_BYTES,
    VALID_BITS,
    Ghcb,
    HvFeature,
    MsrInfo,
    NaeCode,
    Reason,
    Vmsa,
    msr_layout,
)
from sevlab.plugins.snp import buffers as snp_buffers
from sevlab.plugins.snp.automata import SnpGuestState, SnpPlatformState
from sevlab.plugins.snp.ghcb_events import AP_CREATE, AP_CREATE_ON_INIT, AP_DESTROY
from sevlab.plugins.snp.psc import MAX_ENTRIES, PscEntryValue, PscOperation, build_psc, parse_psc

from tests.vectors import load_json, vector_set

GHCB = vector_set("ghcb")
CONSTANTS = load_json(GHCB / "ghcb_constants.json")
MSR_VALUES = load_json(GHCB / "msr_protocol.json")
PSC_BUFFERS = load_json(GHCB / "psc_buffers.json")

FLIPS = {
    "ghcb_constants.json": ("value", "offset", "qword_index", "bit"),
    "msr_protocol.json": ("value", "valid"),
    "mailbox_constants.json": ("id", "code", "sev_data_launch_start", "WORKING", "SUPDATE"),
    "psc_buffers.json": ("shared_buffer", "end_entry", "n_entries", "gfn", "op", "huge"),
}

INFOS = {
    "sev_info_req": MsrInfo.SEV_INFO_REQUEST, "sev_info_resp": MsrInfo.SEV_INFO_RESPONSE,
    "cpuid_req": MsrInfo.CPUID_REQUEST, "cpuid_resp": MsrInfo.CPUID_RESPONSE,
    "ap_reset_hold_req": MsrInfo.AP_RESET_HOLD_REQUEST, "ap_reset_hold_resp": MsrInfo.AP_RESET_HOLD_RESPONSE,
    "preferred_gpa_req": MsrInfo.PREFERRED_GPA_REQUEST, "preferred_gpa_resp": MsrInfo.PREFERRED_GPA_RESPONSE,
    "reg_gpa_req": MsrInfo.REGISTER_GPA_REQUEST, "reg_gpa_resp": MsrInfo.REGISTER_GPA_RESPONSE,
    "psc_req": MsrInfo.PAGE_STATE_REQUEST, "psc_resp": MsrInfo.PAGE_STATE_RESPONSE,
    "vmpl_req": MsrInfo.RUN_VMPL_REQUEST, "vmpl_resp": MsrInfo.RUN_VMPL_RESPONSE,
    "hv_features_req": MsrInfo.HV_FEATURES_REQUEST, "hv_features_resp": MsrInfo.HV_FEATURES_RESPONSE,
    "term_req": MsrInfo.TERMINATE_REQUEST,
}  # fmt: skip

EXITS = {
    "dr7_read": ExitCode.DR7_READ, "dr7_write": ExitCode.DR7_WRITE, "rdtsc": ExitCode.RDTSC, "rdpmc": ExitCode.RDPMC,
    "cpuid": ExitCode.CPUID, "invd": ExitCode.INVD, "ioio": ExitCode.IOIO, "msr": ExitCode.MSR,
    "vmmcall": ExitCode.VMMCALL, "rdtscp": ExitCode.RDTSCP, "wbinvd": ExitCode.WBINVD, "monitor": ExitCode.MONITOR,
    "mwait": ExitCode.MWAIT, "npf": ExitCode.NPF, "mmio_read": NaeCode.MMIO_READ, "mmio_write": NaeCode.MMIO_WRITE,
    "nmi_complete": NaeCode.NMI_COMPLETE, "ap_reset_hold": NaeCode.AP_RESET_HOLD,
    "ap_jump_table": NaeCode.AP_JUMP_TABLE, "snp_psc": NaeCode.SNP_PAGE_STATE_CHANGE,
    "guest_request": NaeCode.SNP_GUEST_REQUEST, "ext_guest_request": NaeCode.SNP_EXTENDED_GUEST_REQUEST,
    "snp_ap_creation": NaeCode.SNP_AP_CREATION, "hv_doorbell": NaeCode.HV_DOORBELL, "hv_ipi": NaeCode.HV_IPI,
    "get_apic_ids": NaeCode.APIC_ID_LIST, "snp_run_vmpl": NaeCode.SNP_RUN_VMPL, "secure_avic": NaeCode.SECURE_AVIC,
    "configure_int_inj": NaeCode.CONFIGURE_INTERRUPT_INJECTION,
    "disable_alt_inj": NaeCode.DISABLE_ALTERNATE_INJECTION, "specific_eoi": NaeCode.SPECIFIC_EOI,
    "hv_features": NaeCode.HV_FEATURES, "term_request": NaeCode.TERMINATION, "unsupported": NaeCode.UNSUPPORTED,
}  # fmt: skip


def bit_of(name):
    return IoioInfo.FIELDS[name].mask


KNOWN = {
    "msr_ghcb": MSR_GHCB,
    "msr_sev_status": MSR_SEV_STATUS,
    "term_general": 0,
    "term_protocol": 1,
    "term_snp_unsupported": 2,
    "hvf_snp": HvFeature.SNP,
    "hvf_ap_creation_bit": HvFeature.SNP_AP_CREATION,
    "hvf_restricted_injection_bit": HvFeature.RESTRICTED_INJECTION,
    "hvf_restricted_injection_timer_bit": HvFeature.RESTRICTED_INJECTION_TIMER,
    "hvf_apic_id_list": HvFeature.APIC_ID_LIST,
    "hvf_multi_vmpl": HvFeature.MULTIPLE_VMPLS,
    "hvf_page_state_change_reserved_bit6": HvFeature.PAGE_STATE_CHANGE,
    "hvf_ext_interrupts": HvFeature.EXTENDED_INTERRUPTS,
    "evtinj_type_int": EventType.INTERRUPT,
    "evtinj_type_nmi": EventType.NMI,
    "evtinj_type_exception": EventType.EXCEPTION,
    "evtinj_type_soft": EventType.SOFTWARE,
    "err_not_registered": Reason.NOT_REGISTERED,
    "err_invalid_usage": Reason.INVALID_USAGE,
    "err_invalid_scratch_area": Reason.INVALID_SCRATCH,
    "err_missing_input": Reason.MISSING_INPUT,
    "err_invalid_input": Reason.INVALID_INPUT,
    "err_invalid_event": Reason.INVALID_EVENT,
    "ioio_type_in": IOIO_IN,
    "ioio_str": IOIO_STRING,
    "ioio_rep": IOIO_REP,
    "ioio_addr16": bit_of("address_16"),
    "ioio_addr32": bit_of("address_32"),
    "ioio_addr64": bit_of("address_64"),
    "ioio_data8": 1 << 4,
    "ioio_data16": 1 << 5,
    "ioio_data32": 1 << 6,
    "ghcb_protocol_min": PROTOCOL_MIN,
    "ghcb_protocol_max": PROTOCOL_MAX,
    "shared_buffer_size": SHARED_BUFFER_BYTES,
    "ap_create_on_init": AP_CREATE_ON_INIT,
    "ap_create": AP_CREATE,
    "ap_destroy": AP_DESTROY,
    "psc_max_entries": MAX_ENTRIES,
    **{f"psc_{operation.name.lower()}": operation for operation in PscOperation},
    **{f"info_{name}": info for name, info in INFOS.items()},
    **{f"exit_{name}": code for name, code in EXITS.items()},
}

NOT_HERE = ("exit_tio_guest_request_draft", "exit_tio_op_draft")
"""Numbers of patches for SEV-TIO, which no plugin has."""


def test_only_drafts_are_left_out():
    names = {constant["name"] for constant in CONSTANTS["constants"]}
    assert names - set(KNOWN) == set(NOT_HERE)


@pytest.mark.parametrize(
    "constant",
    [constant for constant in CONSTANTS["constants"] if constant["name"] not in NOT_HERE],
    ids=lambda constant: constant["name"],
)
def test_constants_agree_with_other_implementations(constant):
    assert KNOWN[constant["name"]] == int(constant["value"], 16)


def test_layouts_agree_with_other_implementations():
    renamed = {"vmpl0_ssp", "vmpl1_ssp", "vmpl2_ssp", "vmpl3_ssp", "dbgctrl"}
    for layout, name in ((Ghcb, "ghcb_layout"), (Vmsa, "vmsa_layout")):
        rows = [row for row in CONSTANTS[name] if row["field"] not in renamed]
        for row in rows:
            info = layout.FIELDS[row["field"]]
            assert (info.offset, info.length_bytes) == (int(row["offset"], 16), row["size"]), row["field"]
        assert rows


def test_valid_bits_agree_with_other_implementations():
    for row in CONSTANTS["valid_bitmap"]:
        assert VALID_BITS[row["field"]] == 1 << row["qword_index"] == 1 << row["byte"] * 8 + row["bit"]
    assert {row["field"] for row in CONSTANTS["valid_bitmap"]} == set(VALID_BITS)


def test_bit_fields_agree_with_other_implementations():
    layouts = {
        "sev_info_resp": (msr_layout.SevInfoResponse, {"cbit": "c_bit", "min": "version_min", "max": "version_max"}),
        "cpuid_req": (msr_layout.CpuidRequest, {"reg": "register"}),
        "cpuid_resp": (msr_layout.CpuidResponse, {"reg": "register"}),
        "term_req": (msr_layout.TerminateRequest, {"reason set": "reason_set", "reason code": "reason_code"}),
        "psc_req_msr": (msr_layout.PageStateRequest, {"op": "operation"}),
        "psc_resp_msr": (msr_layout.ErrorResponse, {}),
        "vmpl_req": (msr_layout.RunVmplRequest, {}),
        "event_inj": (EventWord, {"type": "kind", "error_code_valid": "error_valid"}),
    }
    for name, (layout, names) in layouts.items():
        for field, high, low in re.findall(r"([a-z_ ]+) \[(\d+)(?::(\d+))?\]", CONSTANTS["bitfields"][name]):
            info = layout.FIELDS[names.get(field.strip(), field.strip())]
            place = info.offset * 8 + info.low_bit, info.offset * 8 + info.high_bit
            assert place == (int(low or high), int(high)), (name, field)


REGISTERS = ("eax", "ebx", "ecx", "edx")


def fields_of(kind, value):
    """The fields of an MSR value under the names of the vectors."""
    item = msr_layout.decode(value)
    if kind == "sev_info_resp":
        return {"max": item.version_max, "min": item.version_min, "cbit": item.c_bit}
    if kind == "cpuid_req":
        return {"function": item.function, "register": REGISTERS[item.register]}
    if kind == "cpuid_resp":
        return {"value": item.value, "register": REGISTERS[item.register]}
    if kind in ("preferred_gpa_resp", "reg_gpa_req", "reg_gpa_resp"):
        return {"gpa": hex(item.gfn << 12)}
    if kind == "psc_req":
        return {"gpa": hex(item.gfn << 12), "op": {1: "private", 2: "shared"}[item.operation]}
    if kind == "psc_resp":
        return {"error": item.error}
    if kind == "hv_features_resp":
        return {"features": item.data}
    if kind == "term_req":
        return {"reason_set": item.reason_set, "reason": item.reason_code}
    if kind == "ap_reset_hold_resp":
        return {"success": bool(item.data)}
    return {}


@pytest.mark.parametrize("case", MSR_VALUES, ids=lambda case: f"{case['kind']}-{case['value']}")
def test_msr_values_decode_as_published(case):
    value = int(case["value"], 16)
    layout = msr_layout.LAYOUTS.get(value & 0xFFF)
    right = value & 0xFFF == INFOS[case["kind"]]
    legal = layout is not None and not validate(layout, value.to_bytes(8, "little"))
    assert (right and legal) == case["valid"]
    if case["valid"]:
        assert fields_of(case["kind"], value) == case["fields"]


MAILBOX = load_json(GHCB / "mailbox_constants.json")

LINUX_BUFFERS = {
    "sev_data_init": buffers.Init,
    "sev_data_init_ex": buffers.InitEx,
    "sev_data_pek_csr": buffers.OneBlob,
    "sev_data_pek_cert_import": buffers.PekCertImport,
    "sev_data_download_firmware": buffers.OneBlob,
    "sev_data_get_id": buffers.OneBlob,
    "sev_data_pdh_cert_export": buffers.PdhCertExport,
    "sev_data_decommission": buffers.HandleOnly,
    "sev_data_activate": buffers.Activate,
    "sev_data_deactivate": buffers.HandleOnly,
    "sev_data_guest_status": buffers.GuestStatus,
    "sev_data_launch_start": buffers.LaunchStart,
    "sev_data_launch_update_data": buffers.LaunchUpdate,
    "sev_data_launch_update_vmsa": buffers.LaunchUpdate,
    "sev_data_launch_measure": buffers.LaunchMeasure,
    "sev_data_launch_secret": buffers.Transport,
    "sev_data_launch_finish": buffers.HandleOnly,
    "sev_data_send_start": buffers.SendStart,
    "sev_data_send_update_data": buffers.Transport,
    "sev_data_receive_start": buffers.LaunchStart,
    "sev_data_receive_update_data": buffers.Transport,
    "sev_data_dbg": buffers.Debug,
    "sev_data_attestation_report": buffers.Attestation,
    "sev_user_data_status": buffers.PlatformStatus,
    "sev_data_snp_activate": snp_buffers.SnpActivate,
    "sev_data_snp_addr": snp_buffers.OnePage,
    "sev_data_snp_launch_start": snp_buffers.SnpLaunchStart,
    "sev_data_snp_launch_update": snp_buffers.SnpLaunchUpdate,
    "sev_data_snp_launch_finish": snp_buffers.SnpLaunchFinish,
    "sev_data_snp_guest_status": snp_buffers.SnpGuestStatusCommand,
    "sev_data_snp_page_reclaim": snp_buffers.SnpPageReclaim,
    "sev_data_snp_dbg": snp_buffers.SnpDebug,
    "sev_data_snp_guest_request": snp_buffers.SnpGuestRequest,
    "sev_data_snp_init_ex": snp_buffers.SnpInitEx,
    "sev_data_snp_shutdown_ex": snp_buffers.SnpShutdownEx,
    "sev_data_snp_commit": snp_buffers.SnpCommit,
    "sev_data_snp_feature_info": snp_buffers.SnpFeatureInfo,
    "sev_user_data_snp_status": snp_buffers.SnpPlatformStatus,
    "sev_user_data_snp_config": snp_buffers.SnpConfig,
    "sev_user_data_snp_vlek_load": snp_buffers.SnpVlekLoad,
}
OF_OTHERS = re.compile(r"sev_(data_)?tio_|sla_|spdm_")
"""Sizes of SEV-TIO, which no plugin has."""


def test_mailbox_commands_have_the_numbers_of_two_sources():
    for case in MAILBOX["commands"]:
        assert Command[case["name"]] == int(case["id"], 16), case
        assert case["agree"] == (len(set(case["sources"].values())) == 1)
    assert {int(case["id"], 16) for case in MAILBOX["commands"]} <= set(map(int, Command))


def test_mailbox_statuses_have_the_numbers_and_names_of_all_sources():
    for case in MAILBOX["status_codes"]:
        member = Status(int(case["code"], 16))
        assert member.name in case["names"].values(), case
    assert {int(case["code"], 16) for case in MAILBOX["status_codes"]} == set(map(int, Status))


def test_command_buffers_are_as_long_as_in_linux():
    sizes = MAILBOX["command_buffer_sizes_linux"]
    assert {name: layout.SIZE for name, layout in LINUX_BUFFERS.items()} == {
        name: size for name, size in sizes.items() if not OF_OTHERS.match(name)
    }


def test_states_have_the_numbers_of_sev_tool():
    assert {state.name: state.value for state in PlatformState} == MAILBOX["platform_states"]
    assert {state.name: state.value for state in GuestState} == MAILBOX["sev_guest_states_sev_tool"]
    assert {state.name: state.value for state in SnpPlatformState} == MAILBOX["snp_platform_states"]
    assert {state.name: state.value for state in SnpGuestState} == MAILBOX["snp_guest_states_sev_tool"]


@pytest.mark.parametrize("case", PSC_BUFFERS, ids=lambda case: case["shared_buffer"][:24])
def test_a_page_state_change_parses_and_is_built_again(case):
    raw = bytes.fromhex(case["shared_buffer"])
    header, entries = parse_psc(raw)
    assert (header.cur_entry, header.end_entry, len(entries)) == (
        case["cur_entry"],
        case["end_entry"],
        case["n_entries"],
    )
    assert build_psc(entries, cur_entry=header.cur_entry) == raw
    if case["entries"] is not None:
        assert list(entries) == [
            PscEntryValue(int(entry["gfn"], 16), entry["op"], entry["huge"], entry["cur_page"])
            for entry in case["entries"]
        ]
