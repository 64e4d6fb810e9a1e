"""The link of one page, and the log."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.layout_tools import validate
from sevlab.plugins.snp.launch_digest import (
    NO_DIGEST,
    VMSA_GPA,
    LaunchDigest,
    PageInfo,
    PageType,
    extend,
    page_contents,
)


def test_offsets_of_page_info_are_those_of_the_document():
    expected = {
        "digest_cur": (0x00, 48),
        "contents": (0x30, 48),
        "length": (0x60, 2),
        "page_type": (0x62, 1),
        "imi_page": (0x63, 1),
        "vmpl1_perms": (0x65, 1),
        "vmpl2_perms": (0x66, 1),
        "vmpl3_perms": (0x67, 1),
        "gpa": (0x68, 8),
    }
    assert {name: (info.offset, info.length_bytes) for name, info in PageInfo.FIELDS.items()} == expected
    assert PageInfo.SIZE == 112


@given(
    st.binary(min_size=48, max_size=48),
    st.sampled_from(PageType),
    st.integers(0, (1 << 52) - 1).map(lambda number: number << 12),
    st.booleans(),
    st.tuples(*[st.integers(0, 255)] * 3),
)
def test_a_link_is_the_hash_of_the_112_bytes(start, page_type, gpa, imi_page, permissions):
    contents = page_contents(page_type, b"x" * 4096)
    head = start + contents + b"\x70\x00" + bytes([page_type, imi_page, 0, *permissions])
    image = head + gpa.to_bytes(8, "little")
    assert not validate(PageInfo, image)
    got = extend(start, page_type, gpa, contents, imi_page=imi_page, permissions=permissions)
    assert got == hashlib.sha384(image).digest()


@pytest.mark.parametrize("page_type", PageType)
def test_only_normal_and_vmsa_pages_count_by_contents(page_type):
    counted = page_type in {PageType.NORMAL, PageType.VMSA}
    assert page_contents(page_type, b"a" * 4096) == (hashlib.sha384(b"a" * 4096).digest() if counted else NO_DIGEST)


def test_the_log_has_a_line_for_each_page_that_leads_to_the_next():
    digest = LaunchDigest()
    digest.add_bytes(0x1000, b"a" * 4096 + b"b" * 4096, part="firmware")
    digest.add_range(PageType.ZERO, 0x10000, 0x3000, part="stack")
    digest.add(PageType.VMSA, VMSA_GPA, page_contents(PageType.VMSA, bytes(4096)), part="vcpu 0")
    assert [page.gpa for page in digest.pages] == [0x1000, 0x2000, 0x10000, 0x11000, 0x12000, VMSA_GPA]
    current = NO_DIGEST
    for page in digest.pages:
        current = extend(current, page.page_type, page.gpa, page.contents)
        assert page.launch_digest == current
    assert digest.value == current
    assert digest.pages[0].part == "firmware"
