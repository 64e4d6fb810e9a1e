"""RMP entries, page states and instruction encodings against the published tables."""

from __future__ import annotations

import pytest
from sevlab.plugins.snp import PageState, RmpEntry, RmpState, page_state
from sevlab.plugins.snp.layout import PERM_EXECUTE_SUPERVISOR, PERM_EXECUTE_USER, PERM_READ, PERM_WRITE
from sevlab.plugins.snp.records import ENCODINGS
from sevlab.plugins.snp.rmp_guest import RDX_VMSA
from sevlab.plugins.snp.rmp_host import RmpCode
from sevlab.plugins.snp.states import STATE_BITS

from tests.vectors import load_json, vector_set

VECTORS = load_json(vector_set("rmp") / "rmp.json")
FLIPS = {"rmp.json": ("lo", "hi", "state", "raw_lo_bits", "vmpl_perm_bits", "rmpread_layout_linux", "encodings")}

NAMES = {"gpa_page": "gpa"}


def number(text):
    return int(text, 16) if isinstance(text, str) else text


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: f"{case['state']}-{case['lo']}")
def test_an_entry_encodes_decodes_and_classifies(case):
    fields = {name: number(value) for name, value in case["fields"].items()}
    fields["gpa_page"] = fields.pop("gpa") >> 12
    permissions = {f"vmpl{level}": value for level, value in enumerate(case["vmpl_perms"])}
    low, high = number(case["lo"]), number(case["hi"])
    raw = RmpEntry.build(**fields, **permissions)
    assert raw == low.to_bytes(8, "little") + high.to_bytes(8, "little")
    entry = RmpEntry.from_bytes(raw)
    assert {name: getattr(entry, name) for name in fields} == fields
    assert {name: getattr(entry, name) for name in permissions} == permissions
    assert page_state(low).name.lower() == case["state"]


def test_the_bits_of_an_entry_are_where_both_sources_have_them():
    for name, (first, count) in VECTORS["raw_lo_bits"].items():
        info = RmpEntry.FIELDS[name]
        assert (info.low_bit, info.high_bit - info.low_bit + 1) == (first, count), name


def test_the_page_states_are_those_of_the_table():
    for row in VECTORS["state_table"]:
        low = STATE_BITS[PageState[row["state"].upper()]]
        entry = RmpEntry.from_bytes(low.to_bytes(16, "little"))
        for name in ("assigned", "validated", "immutable"):
            assert getattr(entry, name) == row[name], (row["state"], name)
        if row["vmsa"] != "-":
            assert entry.vmsa == row["vmsa"]
        asid = 5 if row["asid"] == ">0" else 0
        gpa = 7 if row["gpa"] == ">0" else 0
        word = int.from_bytes(entry.replace(asid=asid, gpa_page=gpa).to_bytes()[:8], "little")
        assert page_state(word).name.lower() == row["state"]


def test_permission_bits():
    ours = {
        "read": PERM_READ,
        "write": PERM_WRITE,
        "exec_user": PERM_EXECUTE_USER,
        "exec_supervisor": PERM_EXECUTE_SUPERVISOR,
    }
    assert ours == {name: 1 << bit for name, bit in VECTORS["vmpl_perm_bits"].items()}


def test_the_buffer_of_rmpread_is_linux_s():
    ours = {
        "gpa": ("gpa", "gpa"),
        "assigned": ("assigned", "assigned"),
        "pagesize_and_region_status": ("page_size", "page_size_reserved"),
        "immutable": ("immutable", "immutable"),
        "reserved": ("reserved", "reserved"),
        "asid": ("asid", "asid"),
    }
    for name, (offset, length) in VECTORS["rmpread_layout_linux"].items():
        for field in ours[name]:
            info = RmpState.FIELDS[field]
            assert (info.offset, info.length_bytes) == (offset, length), name


def test_result_codes():
    codes = VECTORS["instruction_results"]
    for instruction in ("pvalidate", "rmpadjust", "rmpupdate", "psmash"):
        for name, value in codes[instruction].items():
            if name != "no_change":
                assert RmpCode[name.upper()] == value, (instruction, name)
    assert codes["rmpadjust_vmsa_attr_bit"] == RDX_VMSA.bit_length() - 1


@pytest.mark.parametrize(("name", "encoding"), VECTORS["instruction_results"]["encodings"].items())
def test_encodings(name, encoding):
    assert ENCODINGS[name].hex() == encoding
