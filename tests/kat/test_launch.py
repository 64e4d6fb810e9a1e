"""Initial VMSA pages against an independent measurement tool and against pages of real guests."""

from __future__ import annotations

import hashlib

import pytest
from sevlab.plugins.sev_es import RESET_EIP, Vmsa, initial_vmsa

from tests.vectors import load_json, vector_set

LAUNCH = vector_set("launch")
VMSAS = load_json(LAUNCH / "vmsa.json")

FLIPS = {"vmsa.json": ("sha256", "sha384", "eip", "sev_features", "vcpu_sig")}


def page_of(case):
    return initial_vmsa(
        case["vmm"].lower(),
        eip=int(case["eip"], 16),
        sev_features=int(case["sev_features"], 16),
        vcpu_signature=int(case["vcpu_sig"], 16),
    )


def test_initial_vmsas_have_the_published_digests():
    wrong = [
        (case["vmm"], case["eip"], case["sev_features"], case["vcpu_type"])
        for case in VMSAS
        if hashlib.sha256(page_of(case)).hexdigest() != case["sha256"]
        or hashlib.sha384(page_of(case)).hexdigest() != case["sha384"]
    ]
    assert not wrong
    assert VMSAS


def test_initial_vmsas_have_the_published_bytes():
    listed = [case for case in VMSAS if case["nonzero"]]
    for case in listed:
        found = {hex(offset): byte for offset, byte in enumerate(page_of(case)) if byte}
        assert found == case["nonzero"]
    assert listed


@pytest.mark.parametrize(("cpu", "eip"), [(0, RESET_EIP), (1, 0x80_B004)])
def test_vmsas_of_a_real_guest_of_2022(cpu, eip):
    real = (LAUNCH / f"fixtures/sevctl_vmsa{cpu}.bin").read_bytes()
    assert initial_vmsa("qemu-2022", eip=eip, vcpu_signature=0xA0_0F11) == real
    assert Vmsa.from_bytes(real).to_bytes() == real


def test_the_vmsa_of_a_real_svsm():
    _type, _gpa, digest = load_json(LAUNCH / "svsm_pages.json")["vmsa_page"]
    page = initial_vmsa("svsm", eip=0xFFAE_A000, sev_features=1, vcpu_signature=0x80_0F12)
    assert hashlib.sha384(page).hexdigest() == digest
