"""The report's layout, and reading it strictly by version."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.errors import FormatError
from sevlab.core.layout_tools import mutations, reserved_ranges, strategy, validate
from sevlab.plugins.snp.id_block import IdAuth, IdBlock
from sevlab.plugins.snp.kernel_hashes import KernelHashTable
from sevlab.plugins.snp.report import (
    VERSIONS,
    AttestationReport,
    GuestPolicy,
    KeyInfo,
    PlatformInfo,
    decode_report,
    parse_report,
)
from sevlab.plugins.snp.tcb import TcbVersion, TurinTcbVersion

OFFSETS = {
    "report_version": (0x000, 4),
    "guest_svn": (0x004, 4),
    "policy": (0x008, 8),
    "family_id": (0x010, 16),
    "image_id": (0x020, 16),
    "vmpl": (0x030, 4),
    "signature_algo": (0x034, 4),
    "current_tcb": (0x038, 8),
    "platform_info": (0x040, 8),
    "key_info": (0x048, 4),
    "report_data": (0x050, 64),
    "measurement": (0x090, 48),
    "host_data": (0x0C0, 32),
    "id_key_digest": (0x0E0, 48),
    "author_key_digest": (0x110, 48),
    "report_id": (0x140, 32),
    "report_id_ma": (0x160, 32),
    "reported_tcb": (0x180, 8),
    "cpuid_family": (0x188, 1),
    "cpuid_model": (0x189, 1),
    "cpuid_stepping": (0x18A, 1),
    "chip_id": (0x1A0, 64),
    "committed_tcb": (0x1E0, 8),
    "current_build": (0x1E8, 1),
    "current_minor": (0x1E9, 1),
    "current_major": (0x1EA, 1),
    "committed_build": (0x1EC, 1),
    "committed_minor": (0x1ED, 1),
    "committed_major": (0x1EE, 1),
    "launch_tcb": (0x1F0, 8),
    "launch_mit_vector": (0x1F8, 8),
    "current_mit_vector": (0x200, 8),
    "sig_r": (0x2A0, 72),
    "sig_s": (0x2E8, 72),
}


def test_offsets_are_those_of_the_document():
    got = {
        name: (info.offset, info.length_bytes)
        for name, info in AttestationReport.FIELDS.items()
        if not name.startswith("reserved_")
    }
    assert got == OFFSETS
    assert reserved_ranges(AttestationReport) == ()


def good(version=5, **fields):
    return AttestationReport.build(report_version=version, policy=0x30000, signature_algo=1, **fields)


@pytest.mark.parametrize("version", [0, 1, 6, 0x0200_0000])
def test_a_version_that_nobody_knows_is_refused(version):
    with pytest.raises(FormatError, match=r"offset 0x0, AttestationReport.report_version: expected one of 0x2, 0x3"):
        parse_report(good(version))


@pytest.mark.parametrize("version", VERSIONS)
def test_each_field_is_there_from_its_version_on(version):
    report = parse_report(good(version))
    assert (report.cpuid_stepping is None) == (version < 3)
    assert (report.current_mit_vector is None) == (version < 5)
    for field, since in (("cpuid_stepping", 3), ("launch_mit_vector", 5)):
        data = good(version, **{field: 1})
        if version >= since:
            assert getattr(parse_report(data), field) == 1
        else:
            with pytest.raises(FormatError, match=f"{field}: expected zero in a report of version {version}"):
                parse_report(data)


@pytest.mark.parametrize("mutation", list(mutations(AttestationReport, good())), ids=lambda m: f"{m.field}-{m.rule}")
def test_each_broken_rule_is_refused_by_its_field(mutation):
    with pytest.raises(FormatError) as error:
        parse_report(mutation.data)
    assert error.value.field == f"AttestationReport.{mutation.field}"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("policy", 0x10000, r"offset 0xa, policy.must_be_one: expected one of 0x1, found 0x0"),
        ("policy", 0x30000 | 1 << 26, r"offset 0xb, policy.reserved_26"),
        ("policy", 0x30000 | 1 << 63, r"offset 0xc, policy.reserved_32"),
        ("platform_info", 1 << 8, r"offset 0x41, platform_info.reserved_8"),
        ("key_info", 2 << 2, r"offset 0x48, key_info.signing_key: expected one of 0x0, 0x1, 0x7, found 0x2"),
        ("key_info", 1 << 5, r"offset 0x48, key_info.reserved_5"),
    ],
)
def test_the_parts_of_a_report_are_read_strictly(field, value, message):
    fields = {"policy": 0x30000, field: value}
    data = AttestationReport.build(report_version=5, signature_algo=1, **fields)
    with pytest.raises(FormatError, match=message):
        parse_report(data)


@given(strategy(AttestationReport), st.sampled_from(VERSIONS))
def test_a_report_comes_back_or_is_refused_where_it_is_wrong(data, version):
    data = version.to_bytes(4, "little") + data[4:8] + (0x30000).to_bytes(8, "little") + data[16:]
    refusal = None
    try:
        report = parse_report(data)
    except FormatError as error:
        refusal = error
    else:
        assert report.to_bytes() == data
        assert decode_report(report)["report_data"] == data[0x50:0x90].hex()
    assert refusal is None or 0 <= refusal.offset < len(data)


LAYOUTS = (GuestPolicy, PlatformInfo, KeyInfo, TcbVersion, TurinTcbVersion, IdBlock, IdAuth, KernelHashTable)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_byte_of_a_small_structure_is_named_and_kept(layout):
    assert reserved_ranges(layout) == ()

    @given(st.binary(min_size=layout.SIZE, max_size=layout.SIZE), strategy(layout))
    def check(any_bytes, valid):
        assert layout.from_bytes(any_bytes).to_bytes() == any_bytes
        assert not validate(layout, valid)

    check()
