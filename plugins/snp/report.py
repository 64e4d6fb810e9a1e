"""The attestation report, versions 2 to 5, for Milan, Genoa and Turin.

A field that a report's version does not define is absent: it reads None, never 0 or false, and its bytes must be zero.
Source: 56860, ATTESTATION_REPORT; virtee/sev src/firmware/guest/types/snp.rs; google/go-sev-guest abi/abi.go. Nothing
that is read here differs between versions 3 and 4: UNVERIFIED, no report of version 4 is published.
"""

from __future__ import annotations

from enum import IntEnum

from sevlab.core.errors import FormatError
from sevlab.core.layout import Layout, bits, flag, raw_bytes, u8, u32, u64
from sevlab.core.layout_tools import read_file_part, validate
from sevlab.plugins.snp.tcb import Tcb, TcbVersion, TurinTcbVersion

SOURCE = "56860, ATTESTATION_REPORT"
VERSIONS = (2, 3, 4, 5)
SIGNED_BYTES = 0x2A0
TURIN_CHIP_ID_BYTES = 8


class SigningKey(IntEnum):
    """Which key signed a report. Source: 56860, KEY_INFO.SIGNING_KEY."""

    VCEK = 0
    VLEK = 1
    NONE = 7


class GuestPolicy(Layout, size=8):
    """What a guest's owner allows. Source: 56860, guest policy."""

    abi_minor = u8(0, source=SOURCE)
    abi_major = u8(1, source=SOURCE)
    smt = flag(2, u8, 0, doc="simultaneous multithreading allowed", source=SOURCE)
    must_be_one = bits(2, u8, 1, 1, values=(1,), source=SOURCE)
    migrate_ma = flag(2, u8, 2, doc="migration agent allowed", source=SOURCE)
    debug = flag(2, u8, 3, doc="debugging allowed", source=SOURCE)
    single_socket = flag(2, u8, 4, doc="one socket only", source=SOURCE)
    cxl_allow = flag(2, u8, 5, source=SOURCE)
    mem_aes_256_xts = flag(2, u8, 6, doc="AES-256-XTS required", source=SOURCE)
    rapl_dis = flag(2, u8, 7, doc="RAPL must be disabled", source=SOURCE)
    ciphertext_hiding = flag(3, u8, 0, doc="ciphertext hiding required", source=SOURCE)
    page_swap_disable = flag(3, u8, 1, source=SOURCE)
    reserved_26 = bits(3, u8, 7, 2, must_be_zero=True, source=SOURCE)
    reserved_32 = u32(4, reserved=0xFFFF_FFFF, source=SOURCE)


class PlatformInfo(Layout, size=8):
    """State of the platform that signed."""

    smt_en = flag(0, u8, 0, source=SOURCE)
    tsme_en = flag(0, u8, 1, source=SOURCE)
    ecc_en = flag(0, u8, 2, source=SOURCE)
    rapl_dis = flag(0, u8, 3, source=SOURCE)
    ciphertext_hiding_dram_en = flag(0, u8, 4, source=SOURCE)
    alias_check_complete = flag(0, u8, 5, source=SOURCE)
    iommu_write_safe = flag(0, u8, 6, doc="UNVERIFIED name; set by a Turin of 2025", source="public verifiers")
    tio_en = flag(0, u8, 7, source=SOURCE)
    reserved_8 = raw_bytes(1, 7, must_be_zero=True, source=SOURCE)


PLATFORM_INFO_SINCE = {"alias_check_complete": 3, "iommu_write_safe": 5, "tio_en": 5}
"""The version that first defines a flag of `PlatformInfo`; the others are in all. Source: virtee/sev."""

IOMMU_WRITE_SAFE = 1 << 6
"""Verifiers of older reports require it to be zero. Source: google/go-sev-guest abi/abi_test.go."""


class KeyInfo(Layout, size=4):
    """Keys behind a report."""

    author_key_en = flag(0, u32, 0, source=SOURCE)
    mask_chip_key = flag(0, u32, 1, source=SOURCE)
    signing_key = bits(0, u32, 4, 2, values=tuple(SigningKey), source=SOURCE)
    reserved_5 = bits(0, u32, 31, 5, must_be_zero=True, source=SOURCE)


class AttestationReport(Layout, size=0x4A0):
    """ATTESTATION_REPORT. Signed are the bytes before `sig_r`."""

    report_version = u32(0x000, values=VERSIONS, source=SOURCE)
    guest_svn = u32(0x004, source=SOURCE)
    policy = u64(0x008, doc="see GuestPolicy", source=SOURCE)
    family_id = raw_bytes(0x010, 16, source=SOURCE)
    image_id = raw_bytes(0x020, 16, source=SOURCE)
    vmpl = u32(0x030, source=SOURCE)
    signature_algo = u32(0x034, values=(1,), doc="ECDSA P-384 with SHA-384", source=SOURCE)
    current_tcb = u64(0x038, doc="see TcbVersion", source=SOURCE)
    platform_info = u64(0x040, doc="see PlatformInfo", source=SOURCE)
    key_info = u32(0x048, doc="see KeyInfo", source=SOURCE)
    reserved_4c = u32(0x04C, reserved=0xFFFF_FFFF, source=SOURCE)
    report_data = raw_bytes(0x050, 64, doc="given by the guest", source=SOURCE)
    measurement = raw_bytes(0x090, 48, doc="the launch digest", source=SOURCE)
    host_data = raw_bytes(0x0C0, 32, doc="given by the host at launch", source=SOURCE)
    id_key_digest = raw_bytes(0x0E0, 48, source=SOURCE)
    author_key_digest = raw_bytes(0x110, 48, source=SOURCE)
    report_id = raw_bytes(0x140, 32, source=SOURCE)
    report_id_ma = raw_bytes(0x160, 32, doc="of the migration agent; all ones without", source=SOURCE)
    reported_tcb = u64(0x180, source=SOURCE)
    cpuid_family = u8(0x188, since=3, doc="combined extended and base family", source=SOURCE)
    cpuid_model = u8(0x189, since=3, source=SOURCE)
    cpuid_stepping = u8(0x18A, since=3, source=SOURCE)
    reserved_18b = raw_bytes(0x18B, 21, must_be_zero=True, source=SOURCE)
    chip_id = raw_bytes(0x1A0, 64, doc="zero when masked; 8 bytes since Turin", source=SOURCE)
    committed_tcb = u64(0x1E0, source=SOURCE)
    current_build = u8(0x1E8, source=SOURCE)
    current_minor = u8(0x1E9, source=SOURCE)
    current_major = u8(0x1EA, source=SOURCE)
    reserved_1eb = u8(0x1EB, reserved=0xFF, source=SOURCE)
    committed_build = u8(0x1EC, source=SOURCE)
    committed_minor = u8(0x1ED, source=SOURCE)
    committed_major = u8(0x1EE, source=SOURCE)
    reserved_1ef = u8(0x1EF, reserved=0xFF, source=SOURCE)
    launch_tcb = u64(0x1F0, source=SOURCE)
    launch_mit_vector = u64(0x1F8, since=5, source=SOURCE)
    current_mit_vector = u64(0x200, since=5, source=SOURCE)
    reserved_208 = raw_bytes(0x208, 152, must_be_zero=True, source=SOURCE)
    sig_r = raw_bytes(0x2A0, 72, doc="little-endian", source=SOURCE)
    sig_s = raw_bytes(0x2E8, 72, doc="little-endian", source=SOURCE)
    reserved_330 = raw_bytes(0x330, 368, must_be_zero=True, source=SOURCE)


REPORT_LAYOUTS: tuple[type[Layout], ...] = (
    AttestationReport,
    GuestPolicy,
    PlatformInfo,
    KeyInfo,
    TcbVersion,
    TurinTcbVersion,
)

PARTS = (("policy", GuestPolicy), ("platform_info", PlatformInfo), ("key_info", KeyInfo))
TCB_FIELDS = ("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb")

GENERATION_BY_CPUID = {(0x19, 0x0): "milan", (0x19, 0x1): "genoa", (0x19, 0xA): "genoa", (0x1A, 0x0): "turin"}
"""By (family, model / 16). Source: google/go-sev-guest abi/abi.go; Linux arch/x86/kernel/cpu/amd.c."""


def parse_report(data: bytes, name: str = "report") -> AttestationReport:
    """The report in file `name`, with every reserved byte zero and every field within its rules.

    Raises `FormatError` with offset, field, what was expected and what was found.
    """
    read_file_part(AttestationReport, data, name)
    if len(data) > AttestationReport.SIZE:
        extra = len(data) - AttestationReport.SIZE
        raise FormatError(name, AttestationReport.SIZE, "end", expected="no more bytes", found=f"{extra:#x} bytes more")
    version = int.from_bytes(data[:4], "little")
    report = AttestationReport.from_bytes(data, version=version)
    for field, part in PARTS:
        offset = AttestationReport.FIELDS[field].offset
        for problem in validate(part, data[offset : offset + part.SIZE]):
            place = offset + problem.offset
            raise FormatError(
                name, place, f"{field}.{problem.field}", expected=problem.expected, found=f"{problem.found:#x}"
            )
    if version < 5 and report.platform_info & IOMMU_WRITE_SAFE:
        expected = f"bit 6 clear in a report of version {version}"
        raise FormatError(name, 0x40, "platform_info", expected=expected, found=f"{report.platform_info:#x}")
    for info in AttestationReport.FIELDS.values():
        undefined = info.since is not None and version < info.since
        if undefined and any(data[info.offset : info.offset + info.length_bytes]):
            raise FormatError(
                name,
                info.offset,
                info.name,
                expected=f"zero in a report of version {version}",
                found=data[info.offset : info.offset + info.length_bytes].hex(),
            )
    return report


def generation_of(report: AttestationReport) -> str:
    """The generation of the part that made `report`; "" for one that is not known.

    Version 2 does not say: only Turin's chip id is short, and Milan and Genoa read alike, so "milan" stands for both.
    """
    if report.cpuid_family is None or report.cpuid_model is None:
        long_id = any(report.chip_id[TURIN_CHIP_ID_BYTES:]) or not any(report.chip_id)
        return "milan" if long_id else "turin"
    return GENERATION_BY_CPUID.get((report.cpuid_family, report.cpuid_model >> 4), "")


def decode_report(report: AttestationReport) -> dict[str, object]:
    """Every field by name for JSON: bytes as hex, parts and TCBs by component, None for what the version lacks."""
    version = report.report_version
    generation = generation_of(report)
    out: dict[str, object] = {}
    for name, info in AttestationReport.FIELDS.items():
        if name.startswith("reserved_"):
            continue
        value = getattr(report, name)
        out[name] = value.hex() if isinstance(value, bytes) else value
        if name in TCB_FIELDS:
            out[name] = {"raw": value, **Tcb.of(value, generation)._asdict()}
        for field, part in PARTS:
            if field == name:
                flags = part.from_bytes(value.to_bytes(info.length_bytes, "little"))
                out[name] = {"raw": value} | {
                    flag_name: None if PLATFORM_INFO_SINCE.get(flag_name, 0) > version else getattr(flags, flag_name)
                    for flag_name in part.FIELDS
                    if not flag_name.startswith("reserved_")
                }
    return out
