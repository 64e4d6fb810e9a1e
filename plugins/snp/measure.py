"""What a guest's launch will measure, from the files that a VMM loads: SEV, SEV-ES, SNP, and SNP with an SVSM.

Source: QEMU target/i386/sev.c; virtee sev-snp-measure 0.0.13 sevsnpmeasure/guest.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from sevlab.core.errors import ConfigError, FormatError
from sevlab.core.units import PAGE_BYTES
from sevlab.plugins.sev import SevLaunchDigest
from sevlab.plugins.sev_es import PROFILES, RESET_EIP, initial_vmsa
from sevlab.plugins.snp.firmware import Firmware, Section, SectionType
from sevlab.plugins.snp.kernel_hashes import hash_page
from sevlab.plugins.snp.launch_digest import NO_DIGEST, VMSA_GPA, LaunchDigest, PageType

SNP_ACTIVE = 1
"""SEV_FEATURES of an SNP guest that asks for nothing else."""


def boot_vmsas(profile: str, vcpus: int, *, ap_eip: int, sev_features: int, vcpu_signature: int) -> tuple[bytes, ...]:
    """The VMSA page of each vCPU, as VMM `profile` launches it: the first at the reset vector, others at `ap_eip`."""
    if profile not in PROFILES:
        raise ConfigError(f"VMM {profile!r}: expected one of {', '.join(PROFILES)}")
    pages = (
        initial_vmsa(profile, eip=eip, sev_features=sev_features, vcpu_signature=vcpu_signature)
        for eip in (RESET_EIP, ap_eip)
    )
    first, other = pages
    return (first,) + (other,) * (vcpus - 1)


def svsm_vmsas(svsm: Firmware, vcpus: int, *, vcpu_signature: int) -> tuple[bytes, ...]:
    """The VMSA pages of an SVSM: all alike, in 32-bit protected mode at its entry point."""
    page = initial_vmsa("svsm", eip=svsm.svsm_eip, sev_features=SNP_ACTIVE, vcpu_signature=vcpu_signature)
    return (page,) * vcpus


def measure_sev(
    firmware: Firmware, *, hash_table: bytes | None = None, vmsas: Sequence[bytes] = (), log: bool = False
) -> SevLaunchDigest:
    """The launch of an SEV guest, or with `vmsas` of an SEV-ES guest. Raises `FormatError`.

    `hash_table`: the kernel hashes, if QEMU loads a kernel.
    """
    digest = SevLaunchDigest(log=log)
    digest.add("firmware", firmware.start_gpa, firmware.data)
    if hash_table is not None:
        digest.add("kernel hashes", firmware.hash_table_gpa, hash_table)
    for number, page in enumerate(vmsas):
        digest.add(f"VMSA of vCPU {number}", None, page)
    return digest


def measure_snp(
    firmware: Firmware,
    *,
    vmsas: Sequence[bytes],
    hash_table: bytes | None = None,
    profile: str = "qemu",
    firmware_digest: bytes | None = None,
) -> LaunchDigest:
    """The launch of an SNP guest, page by page. Raises `FormatError`.

    `firmware_digest`: the launch digest after the firmware's pages, to go on from in place of its bytes.
    """
    digest = LaunchDigest(firmware_digest or NO_DIGEST)
    if firmware_digest is None:
        add_image(digest, firmware, "firmware")
    add_sections(digest, firmware, profile=profile, hash_table=hash_table)
    if hash_table is not None and not firmware.has_section(SectionType.KERNEL_HASHES):
        offset = firmware.sections[0].offset if firmware.sections else max(len(firmware.data) - 32, 0)
        found = f"sections of type {[section.section_type for section in firmware.sections]}"
        raise FormatError(
            firmware.name, offset, "SEV metadata", expected="a section for kernel hashes (type 16)", found=found
        )
    add_vmsas(digest, vmsas)
    return digest


def measure_svsm(firmware: Firmware, svsm: Firmware, *, vmsas: Sequence[bytes]) -> LaunchDigest:
    """The launch of an SNP guest with an SVSM, by QEMU: both images, then the SVSM's metadata. Raises `FormatError`."""
    digest = LaunchDigest()
    add_image(digest, firmware, "firmware")
    add_image(digest, svsm, "SVSM")
    add_sections(digest, svsm, profile="qemu", hash_table=None)
    add_vmsas(digest, vmsas)
    return digest


def add_image(digest: LaunchDigest, firmware: Firmware, part: str) -> None:
    """Measure an image's pages. Raises `FormatError` for an image that is not whole pages."""
    rest = len(firmware.data) % PAGE_BYTES
    if rest or not firmware.data:
        found = f"{len(firmware.data):#x} bytes"
        offset = len(firmware.data) - rest
        raise FormatError(firmware.name, offset, "size", expected=f"a multiple of {PAGE_BYTES:#x}", found=found)
    digest.add_bytes(firmware.start_gpa, firmware.data, part=part)


def add_sections(digest: LaunchDigest, firmware: Firmware, *, profile: str, hash_table: bytes | None) -> None:
    """Measure the ranges of an image's metadata in the order of the VMM. Raises `FormatError`."""
    later = []
    for section in firmware.sections:
        if section.section_type == SectionType.CPUID and profile == "ec2":
            later.append(section)
        else:
            _add_section(digest, firmware, section, profile=profile, hash_table=hash_table)
    for section in later:
        _add_section(digest, firmware, section, profile=profile, hash_table=hash_table)


def _add_section(
    digest: LaunchDigest, firmware: Firmware, section: Section, *, profile: str, hash_table: bytes | None
) -> None:
    kind, gpa, length = section.section_type, section.gpa, section.length_bytes
    if length % PAGE_BYTES:
        expected = f"a multiple of {PAGE_BYTES:#x}"
        raise FormatError(firmware.name, section.offset + 4, "section length", expected=expected, found=f"{length:#x}")
    if kind == SectionType.SEC_MEM:
        page_type = PageType.UNMEASURED if profile == "gce" else PageType.ZERO
        digest.add_range(page_type, gpa, length, part="SEC memory")
    elif kind == SectionType.SECRETS:
        digest.add(PageType.SECRETS, gpa, part="secrets page")
    elif kind == SectionType.CPUID:
        digest.add(PageType.CPUID, gpa, part="CPUID page")
    elif kind == SectionType.SVSM_CAA:
        digest.add_range(PageType.ZERO, gpa, length, part="SVSM calling area")
    elif kind == SectionType.KERNEL_HASHES and hash_table is None:
        digest.add_range(PageType.ZERO, gpa, length, part="kernel hashes, unused")
    elif kind == SectionType.KERNEL_HASHES:
        assert hash_table is not None
        if length != PAGE_BYTES:
            raise FormatError(
                firmware.name, section.offset + 4, "section length", expected=f"{PAGE_BYTES:#x}", found=f"{length:#x}"
            )
        digest.add_bytes(gpa, hash_page(hash_table, firmware.hash_table_gpa), part="kernel hashes")
    else:
        expected = "one of " + ", ".join(f"{known:#x}" for known in SectionType)
        raise FormatError(firmware.name, section.offset + 8, "section type", expected=expected, found=f"{kind:#x}")


def add_vmsas(digest: LaunchDigest, vmsas: Sequence[bytes]) -> None:
    """Measure the VMSAs, all at the address that KVM gives them."""
    for number, page in enumerate(vmsas):
        digest.add_bytes(VMSA_GPA, page, page_type=PageType.VMSA, part=f"VMSA of vCPU {number}")
