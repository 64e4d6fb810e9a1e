"""The VMSA's layout and the launch profiles."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.layout_tools import strategy, validate
from sevlab.core.testing import assert_offsets
from sevlab.plugins.sev_es import PROFILES, SevFeatures, Vmsa, initial_vmsa, segment_bytes, segment_of

U64S = {
    0x0A0: "pl0_ssp pl1_ssp pl2_ssp pl3_ssp u_cet",
    0x140: "xss cr4 cr3 cr0 dr7 dr6 rflags rip dr0 dr1 dr2 dr3",
    0x1A0: "dr0_addr_mask dr1_addr_mask dr2_addr_mask dr3_addr_mask",
    0x1D8: "rsp s_cet ssp isst_addr rax star lstar cstar sfmask kernel_gs_base sysenter_cs sysenter_esp"
    " sysenter_eip cr2",
    0x268: "g_pat dbgctl br_from br_to last_excp_from last_excp_to",
    0x2F0: "tsc_scale tsc_offset reg_prot_nonce rcx rdx rbx secure_avic_control rbp rsi rdi"
    " r8 r9 r10 r11 r12 r13 r14 r15",
    0x390: "guest_exit_info_1 guest_exit_info_2 guest_exit_int_info guest_nrip sev_features vintr_ctrl"
    " guest_exit_code virtual_tom tlb_id pcpu_id event_inj xcr0",
    0x770: "lbr_select ibs_fetch_ctl ibs_fetch_linaddr ibs_op_ctl ibs_op_rip ibs_op_data ibs_op_data2 ibs_op_data3"
    " ibs_dc_linaddr bp_ibstgt_rip ic_ibs_extd_ctl",
}


def test_offsets_are_those_of_the_document():
    expected = {
        name: (16 * n, 16) for n, name in enumerate(["es", "cs", "ss", "ds", "fs", "gs", "gdtr", "ldtr", "idtr", "tr"])
    }
    for start, names in U64S.items():
        expected |= {name: (start + 8 * n, 8) for n, name in enumerate(names.split())}
    expected |= {"vmpl": (0xCA, 1), "cpl": (0xCB, 1), "efer": (0xD0, 8), "spec_ctrl": (0x2E0, 8)}
    expected |= {"pkru": (0x2E8, 4), "tsc_aux": (0x2EC, 4), "x87_dp": (0x400, 8), "mxcsr": (0x408, 4)}
    for n, name in enumerate(["x87_ftw", "x87_fsw", "x87_fcw", "x87_fop", "x87_ds", "x87_cs"]):
        expected[name] = (0x40C + 2 * n, 2)
    expected |= {"x87_rip": (0x418, 8), "fpreg_x87": (0x420, 80), "fpreg_xmm": (0x470, 256)}
    expected |= {"fpreg_ymm": (0x570, 256), "lbr_stack": (0x670, 256)}
    assert_offsets(Vmsa, expected, 4096)
    assert set(expected) == set(Vmsa.FIELDS)


def test_sev_features_bits_are_those_of_the_document():
    bits = {
        "snp_active": 0, "vtom": 1, "reflect_vc": 2, "restricted_injection": 3, "alternate_injection": 4,
        "debug_swap": 5, "prevent_host_ibs": 6, "btb_isolation": 7, "vmpl_sss": 8, "secure_tsc": 9,
        "vmgexit_parameter": 10, "pmc_virtualization": 11, "ibs_virtualization": 12, "guest_intercept_control": 13,
        "vmsa_register_protection": 14, "smt_protection": 15, "secure_avic": 16, "ibpb_on_entry": 21,
    }  # fmt: skip
    assert {name: info.low_bit for name, info in SevFeatures.FIELDS.items()} == bits


@given(st.integers().map(lambda seed: random.Random(seed).randbytes(4096)))
def test_any_bytes_survive_a_round_trip(data):
    assert Vmsa.from_bytes(data).to_bytes() == data


@given(strategy(Vmsa))
def test_valid_pages_break_no_rule(data):
    assert not validate(Vmsa, data)


@given(st.tuples(*(st.integers(0, (1 << width) - 1) for width in (16, 16, 32, 64))))
def test_a_segment_slot_is_selector_attributes_limit_base(segment):
    slot = segment_bytes(segment)
    assert segment_of(slot) == segment
    assert (slot[:2], slot[2:4], slot[4:8], slot[8:]) == tuple(
        part.to_bytes(width, "little") for part, width in zip(segment, (2, 2, 4, 8), strict=True)
    )


def test_the_reset_address_is_split_into_base_and_rip():
    page = Vmsa.from_bytes(initial_vmsa(eip=0x1234_5678))
    assert (page.rip, segment_of(page.cs)) == (0x5678, (0xF000, 0x9B, 0xFFFF, 0x1234_0000))


def test_a_flat_profile_starts_in_protected_mode_at_the_whole_address():
    page = Vmsa.from_bytes(initial_vmsa("svsm", eip=0x1234_5678))
    assert (page.rip, page.cr0, segment_of(page.cs)) == (0x1234_5678, 0x11, (8, 0xC9B, 0xFFFF_FFFF, 0))


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_gives_a_page_that_vmrun_takes(name):
    page = Vmsa.from_bytes(initial_vmsa(name, vcpu_signature=0xA0_0F11))
    assert page.efer & 0x1000
    assert not validate(Vmsa, page.to_bytes())


def test_ec2_marks_only_the_boot_processors_code_segment_as_not_accessed():
    boot, other = initial_vmsa("ec2"), initial_vmsa("ec2", eip=0x80_B004)
    attributes = [segment_of(Vmsa.from_bytes(page).cs)[1] for page in (boot, other)]
    assert attributes == [0x9A, 0x9B]
