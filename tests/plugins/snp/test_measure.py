"""Launches that no vector covers: an SVSM's order of pages, the VMMs' differences, refusals."""

from __future__ import annotations

import hashlib

import pytest
from sevlab.core.errors import ConfigError, FormatError
from sevlab.plugins.sev_es import Vmsa
from sevlab.plugins.snp import driver
from sevlab.plugins.snp.firmware import parse_firmware
from sevlab.plugins.snp.kernel_hashes import hash_page, kernel_hash_table
from sevlab.plugins.snp.launch_digest import VMSA_GPA, LaunchDigest, PageType
from sevlab.plugins.snp.measure import add_image, boot_vmsas, measure_sev, measure_snp, measure_svsm, svsm_vmsas
from sevlab.plugins.snp.vcpu_types import vcpu_signature

from tests.plugins.snp.support import context, snp_machine
from tests.plugins.snp.test_firmware import ENTRIES, GOOD, SECTIONS, image

TABLE = kernel_hash_table(bytes(32), None, None)


def vmsas(profile="qemu", vcpus=1):
    return boot_vmsas(profile, vcpus, ap_eip=0x80B004, sev_features=1, vcpu_signature=0x800F12)


def kinds(digest):
    return [(PageType(page.page_type).name, page.gpa) for page in digest.pages]


def test_the_pages_of_a_launch_are_firmware_metadata_and_vmsas_in_this_order():
    digest = measure_snp(parse_firmware(GOOD), vmsas=vmsas(vcpus=2), hash_table=TABLE)
    assert kinds(digest)[:2] == [("NORMAL", 0xFFFFE000), ("NORMAL", 0xFFFFF000)]
    assert kinds(digest)[2:11] == [("ZERO", 0x800000 + n * 4096) for n in range(9)]
    assert kinds(digest)[11:] == [
        ("SECRETS", 0x80D000),
        ("CPUID", 0x80E000),
        ("NORMAL", 0x80F000),
        ("VMSA", VMSA_GPA),
        ("VMSA", VMSA_GPA),
    ]
    assert digest.pages[13].contents == hashlib.sha384((bytes(0xC00) + TABLE).ljust(4096, b"\0")).digest()
    unused = measure_snp(parse_firmware(GOOD), vmsas=vmsas())
    assert kinds(unused)[13] == ("ZERO", 0x80F000)


def test_ec2_measures_the_cpuid_page_last_and_gce_does_not_measure_sec_memory():
    ec2 = measure_snp(parse_firmware(GOOD), vmsas=vmsas("ec2"), profile="ec2")
    assert kinds(ec2)[-3:] == [("ZERO", 0x80F000), ("CPUID", 0x80E000), ("VMSA", VMSA_GPA)]
    gce = measure_snp(parse_firmware(GOOD), vmsas=vmsas("gce"), profile="gce")
    assert {kind for kind, gpa in kinds(gce) if 0x800000 <= gpa < 0x809000} == {"UNMEASURED"}


def test_a_launch_goes_on_from_the_digest_of_the_firmware():
    firmware = parse_firmware(GOOD)
    start = LaunchDigest()
    add_image(start, firmware, "firmware")
    whole = measure_snp(firmware, vmsas=vmsas())
    assert measure_snp(firmware, vmsas=vmsas(), firmware_digest=start.value).value == whole.value


def test_an_svsm_lies_below_the_firmware_and_its_metadata_counts():
    svsm = parse_firmware(GOOD, "svsm", end_gpa=0xFFC0_0000)
    pages = svsm_vmsas(svsm, 2, vcpu_signature=0x800F12)
    plain = parse_firmware(image([]), "ovmf")
    digest = measure_svsm(plain, svsm, vmsas=pages)
    assert kinds(digest)[:4] == [("NORMAL", gpa) for gpa in (0xFFFFE000, 0xFFFFF000, 0xFFBFE000, 0xFFBFF000)]
    assert kinds(digest)[4] == ("ZERO", 0x800000)
    assert kinds(digest)[-2:] == [("VMSA", VMSA_GPA)] * 2
    vmsa = Vmsa.from_bytes(pages[0])
    assert (vmsa.rip, vmsa.cr0, vmsa.rdx, vmsa.sev_features) == (0xFFC0_0000 - 0x2000 + 0x100, 0x11, 0x800F12, 1)
    assert pages[0] == pages[1]


def test_application_processors_start_where_the_firmware_says():
    first, second, third = (Vmsa.from_bytes(page) for page in vmsas(vcpus=3))
    assert (first.rip, second.rip) == (0xFFF0, 0xB004)
    assert second == third


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ([(0x800000, 0x1000, 7)], r"offset 0x1c18, section type: expected one of 0x1, .*, 0x10, found 0x7"),
        ([(0x800000, 0x800, 1)], r"offset 0x1c14, section length: expected a multiple of 0x1000, found 0x800"),
        ([(0x80F000, 0x2000, 0x10)], r"offset 0x1c14, section length: expected 0x1000, found 0x2000"),
        ([(0x800000, 0x1000, 1)], r"offset 0x1c10, SEV metadata: expected a section for kernel hashes"),
    ],
    ids=range(4),
)
def test_sections_that_cannot_be_launched_are_refused(sections, message):
    with pytest.raises(FormatError, match=message):
        measure_snp(parse_firmware(image(ENTRIES, sections=sections)), vmsas=vmsas(), hash_table=TABLE)


def test_an_image_that_is_not_whole_pages_cannot_be_launched_under_snp():
    short = parse_firmware(GOOD[100:], "short")
    with pytest.raises(FormatError, match=r"short: offset 0x1000, size: expected a multiple of 0x1000, found 0x1f9c"):
        measure_snp(short, vmsas=vmsas())
    with pytest.raises(FormatError, match=r"empty: offset 0x0, size"):
        measure_snp(parse_firmware(b"", "empty"), vmsas=())
    assert measure_sev(short).value == hashlib.sha256(GOOD[100:]).digest()


def test_the_log_of_an_sev_launch_says_the_same_as_no_log():
    firmware = parse_firmware(GOOD)
    quiet = measure_sev(firmware, hash_table=TABLE, vmsas=vmsas())
    loud = measure_sev(firmware, hash_table=TABLE, vmsas=vmsas(), log=True)
    assert quiet.value == loud.value == loud.parts[-1].launch_digest
    assert [(part.part, part.gpa, part.length_bytes) for part in loud.parts] == [
        ("firmware", 0xFFFFE000, 4096),
        ("firmware", 0xFFFFF000, 4096),
        ("kernel hashes", 0x80FC00, len(TABLE)),
        ("VMSA of vCPU 0", None, 4096),
    ]
    assert quiet.parts == []


def test_a_vmm_that_nobody_knows_is_refused():
    with pytest.raises(ConfigError, match="VMM 'xen': expected one of qemu"):
        vmsas("xen")


@pytest.mark.parametrize(
    ("numbers", "eax"),
    [((25, 1, 1), 0xA00F11), ((6, 0x9A, 3), 0x906A3), ((15, 0, 0), 0xF00), ((0x10E, 255, 15), 0xFFF0FFF)],
)
def test_the_signature_of_a_processor(numbers, eax):
    assert vcpu_signature(*numbers) == eax


@pytest.mark.parametrize("numbers", [(0x10F, 0, 0), (-1, 0, 0), (25, 256, 0), (25, 1, 16)])
def test_numbers_that_no_signature_holds_are_refused(numbers):
    with pytest.raises(ConfigError, match=r"vCPU (family|model|stepping)"):
        vcpu_signature(*numbers)


@pytest.mark.slow
def test_the_firmware_measures_what_the_owner_expects():
    image_of_guest = parse_firmware(GOOD)
    expected = measure_snp(image_of_guest, vmsas=vmsas(vcpus=2), hash_table=TABLE)
    machine = snp_machine(memory=16 << 20, vcpus=2)
    guest = driver.begin_launch(machine, 0)
    contents = dict(zip((0xFFFFE000, 0xFFFFF000), (GOOD[:4096], GOOD[4096:]), strict=True))
    contents[0x80F000] = hash_page(TABLE, 0x80FC00)
    for page in expected.pages[:-2]:
        launched = driver.LaunchPage(page.gpa, page.page_type, contents.get(page.gpa, bytes(4096)))
        assert driver.load(machine, 0, guest, launched) == 0
    for vcpu_id, vmsa in zip(machine.hypervisor.vms[0].vcpu_ids, vmsas(vcpus=2), strict=True):
        driver.load_vmsa(machine, vcpu_id, guest, vmsa)
    assert context(machine, guest).launch_digest == expected.value


def test_sections_is_what_the_recipe_says():
    assert [section[:3] for section in parse_firmware(GOOD).sections] == SECTIONS
