"""The SNP launch digest: a hash chain with one link for each page, and a log of every link.

Source: 56860, SNP_LAUNCH_UPDATE (PAGE_INFO); AMD-ASPFW sev_uapp sev_rmp.c; virtee sev-snp-measure
sevsnpmeasure/gctx.py.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum
from functools import cache
from typing import NamedTuple

from sevlab.core.layout import Layout, flag, raw_bytes, u8, u16, u64
from sevlab.core.units import PAGE_BYTES

SOURCE = "56860, table PAGE_INFO"

DIGEST_BYTES = 48
NO_DIGEST = bytes(DIGEST_BYTES)
"""The launch digest before the first page, and the contents of pages that are not measured."""

VMSA_GPA = 0xFFFF_FFFF_F000
"""Where KVM says a VMSA lies: the last page of the 48-bit address space. Source: Linux arch/x86/kvm/svm/sev.c."""


class PageType(IntEnum):
    """What a launched page is. Source: 56860, SNP_LAUNCH_UPDATE, PAGE_TYPE."""

    NORMAL = 1
    VMSA = 2
    ZERO = 3
    UNMEASURED = 4
    SECRETS = 5
    CPUID = 6


MEASURED_CONTENTS = frozenset({PageType.NORMAL, PageType.VMSA})
"""Page types whose contents are part of the measurement."""


class PageInfo(Layout, size=0x70):
    """One link of the chain. The order of the permissions follows the firmware; tools differ, zero masks hide it."""

    digest_cur = raw_bytes(0x00, DIGEST_BYTES, doc="the launch digest so far", source=SOURCE)
    contents = raw_bytes(0x30, DIGEST_BYTES, doc="SHA-384 of the page, or zero", source=SOURCE)
    length = u16(0x60, values=(0x70,), source=SOURCE)
    page_type = u8(0x62, values=tuple(PageType), source=SOURCE)
    imi_page = flag(0x63, u8, 0, source=SOURCE)
    vmpl1_perms = u8(0x65, source="AMD-ASPFW sev_rmp.c")
    vmpl2_perms = u8(0x66, source="AMD-ASPFW sev_rmp.c")
    vmpl3_perms = u8(0x67, source="AMD-ASPFW sev_rmp.c")
    gpa = u64(0x68, aligned=PAGE_BYTES, source=SOURCE)


class MeasuredPage(NamedTuple):
    """One line of the log: what was measured, and the launch digest after it. `part` says what of the guest it is."""

    page_type: int
    gpa: int
    contents: bytes
    launch_digest: bytes
    part: str = ""


def page_contents(page_type: int, page: bytes | memoryview) -> bytes:
    """What stands for the page's 4096 bytes in its link: SHA-384, or zeros for a type whose contents do not count."""
    return hashlib.sha384(page).digest() if page_type in MEASURED_CONTENTS else NO_DIGEST


def extend(
    launch_digest: bytes,
    page_type: int,
    gpa: int,
    contents: bytes,
    *,
    imi_page: bool = False,
    permissions: tuple[int, int, int] = (0, 0, 0),
) -> bytes:
    """The launch digest after one more page.

    `contents`: 48 bytes from `page_contents`; `gpa`: address of the page; `permissions`: masks of VMPL1 to VMPL3.
    """
    info = launch_digest + contents + _description(page_type, imi_page, permissions) + gpa.to_bytes(8, "little")
    return hashlib.sha384(info).digest()


@cache
def _description(page_type: int, imi_page: bool, permissions: tuple[int, int, int]) -> bytes:  # noqa: FBT001
    """The bytes of `PageInfo` between contents and GPA, the same for most pages of a launch."""
    vmpl1, vmpl2, vmpl3 = permissions
    info = PageInfo.build(
        length=PageInfo.SIZE,
        page_type=page_type,
        imi_page=int(imi_page),
        vmpl1_perms=vmpl1,
        vmpl2_perms=vmpl2,
        vmpl3_perms=vmpl3,
    )
    return info[2 * DIGEST_BYTES : PageInfo.FIELDS["gpa"].offset]


class LaunchDigest:
    """A launch digest as it grows, page by page, with its log."""

    def __init__(self, start: bytes = NO_DIGEST) -> None:
        self.value = start
        self.pages: list[MeasuredPage] = []

    def add(self, page_type: int, gpa: int, contents: bytes = NO_DIGEST, *, part: str = "") -> None:
        """Measure one page by the digest of its contents."""
        self.value = extend(self.value, page_type, gpa, contents)
        self.pages.append(MeasuredPage(page_type, gpa, contents, self.value, part))

    def add_bytes(self, gpa: int, data: bytes, *, page_type: int = PageType.NORMAL, part: str = "") -> None:
        """Measure the pages of `data`, a whole number of them, from `gpa` on."""
        view = memoryview(data)
        for offset in range(0, len(data), PAGE_BYTES):
            contents = page_contents(page_type, view[offset : offset + PAGE_BYTES])
            self.add(page_type, gpa + offset, contents, part=part)

    def add_range(self, page_type: int, gpa: int, length_bytes: int, *, part: str = "") -> None:
        """Measure pages whose contents do not count."""
        for offset in range(0, length_bytes, PAGE_BYTES):
            self.add(page_type, gpa + offset, part=part)
