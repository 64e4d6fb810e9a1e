"""Launches against independent measurement tools and real guests: VMSAs, digests, hash tables, every SNP page."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from sevlab.core.errors import FormatError
from sevlab.plugins.sev_es import RESET_EIP, Vmsa, initial_vmsa
from sevlab.plugins.snp.firmware import Firmware, Section, parse_firmware
from sevlab.plugins.snp.kernel_hashes import hash_page, kernel_hash_table
from sevlab.plugins.snp.launch_digest import LaunchDigest, PageType
from sevlab.plugins.snp.measure import add_image, boot_vmsas, measure_sev, measure_snp
from sevlab.plugins.snp.vcpu_types import VCPU_TYPES

from tests.vectors import load_json, vector_set

LAUNCH = vector_set("launch")
VMSAS = load_json(LAUNCH / "vmsa.json")

FLIPS = {
    "vmsa.json": ("sha256", "sha384", "eip", "sev_features", "vcpu_sig"),
    "digests.json": ("digest", "kernel", "vcpu_sig"),
    "published_digests.json": ("digest",),
    "snp_update_trace.json": ("page_type", "gpa", "contents", "ld_after"),
    "svsm_pages.json": ("2_vcpus",),
    "sev_hashes_table.json": ("table", "page_at_0xc00_sha384"),
    "vcpu_sigs.json": ("EPYC-Milan",),
    "images.json": ("snp_ovmf_hash",),
}


def page_of(case):
    return initial_vmsa(
        case["vmm"].lower(),
        eip=int(case["eip"], 16),
        sev_features=int(case["sev_features"], 16),
        vcpu_signature=int(case["vcpu_sig"], 16),
    )


def test_initial_vmsas_have_the_published_digests():
    assert all(int(case["vcpu_sig"], 16) == VCPU_TYPES[case["vcpu_type"]] for case in VMSAS)
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


# Whole launches ---------------------------------------------------------------------------------------------------

IMAGES = load_json(LAUNCH / "images.json")
BLOBS = load_json(LAUNCH / "blobs.json")
DIGESTS = load_json(LAUNCH / "digests.json")["cases"]
PUBLISHED = load_json(LAUNCH / "published_digests.json")["cases"]
TRACE = load_json(LAUNCH / "snp_update_trace.json")
SYNTHETIC = {image["name"]: image for image in IMAGES["synthetic"]}
REAL = {image["name"]: image for image in IMAGES["real"]}
FETCH_OVMF = Path(__file__).parents[1] / "guests" / "fetch-ovmf"
NEVER = b""
"""What a launch that must fail gives: no digest."""


def blob(name):
    recipe = BLOBS[name]
    blocks = range(-(-recipe["len"] // 32))
    data = b"".join(hashlib.sha256(recipe["seed"].encode() + n.to_bytes(4, "little")).digest() for n in blocks)
    data = data[: recipe["len"]]
    assert hashlib.sha256(data).hexdigest() == recipe["sha256"]
    return data


def real_file(image):
    """The firmware file of a Debian package, where it is installed or unpacked; None without it."""
    for root in (Path(os.environ.get("SEVLAB_OVMF", "/")), Path("/")):
        path = root / image["path"].lstrip("/")
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == image["sha256"]:
            return path.read_bytes()
    return None


def firmware_of(name):
    if name in SYNTHETIC:
        return parse_firmware((LAUNCH / SYNTHETIC[name]["file"]).read_bytes(), name)
    if name in REAL:
        image = REAL[name]
        table = {guid: bytes.fromhex(data) for guid, data in image["table"].items()}
        sections = tuple(Section(int(m["gpa"], 16), int(m["size"], 16), m["type"]) for m in image["metadata"] or ())
        return Firmware(name, real_file(image) or b"", int(image["gpa"], 16), table, sections)
    return parse_firmware((LAUNCH / "fixtures" / name).read_bytes(), name)


def hash_table_of(case):
    """The hash table, or None without a kernel; "" stands for an empty file in the published cases."""
    if case["kernel"] is None:
        return None
    kernel, initrd = (blob(case[part]) if case[part] else case[part] and b"" for part in ("kernel", "initrd"))
    return kernel_hash_table(
        hashlib.sha256(kernel or b"").digest(), hashlib.sha256(initrd or b"").digest(), case["cmdline"]
    )


def number(value):
    return int(value, 16) if isinstance(value, str) else value


def launch(case):
    firmware = firmware_of(case["image"])
    profile = case["vmm"].lower()
    if case["mode"] == "sev":
        return measure_sev(firmware, hash_table=hash_table_of(case)).value
    signature = number(case["vcpu_sig"]) if "vcpu_sig" in case else VCPU_TYPES.get(case["vcpu_type"], 0)
    features = 0 if case["mode"] == "sev-es" else number(case["guest_features"])
    vmsas = boot_vmsas(
        profile, case["vcpus"], ap_eip=firmware.reset_eip, sev_features=features, vcpu_signature=signature
    )
    if case["mode"] == "sev-es":
        return measure_sev(firmware, hash_table=hash_table_of(case), vmsas=vmsas).value
    start = bytes.fromhex(case.get("snp_ovmf_hash") or "") or page_chain(case["image"])
    return measure_snp(
        firmware, vmsas=vmsas, hash_table=hash_table_of(case), profile=profile, firmware_digest=start
    ).value


def page_chain(name):
    """The launch digest after a real image's pages, of which only the digests are published; None for other images."""
    if name not in REAL:
        return None
    if "page_digests_file" not in REAL[name]:
        return bytes.fromhex(REAL[name]["snp_ovmf_hash"])
    pages = load_json(LAUNCH / REAL[name]["page_digests_file"])
    digest = LaunchDigest()
    for index, contents in enumerate(pages["sha384_per_4k_page"]):
        digest.add(PageType.NORMAL, int(pages["start_gpa"], 16) + index * 4096, bytes.fromhex(contents))
    assert digest.value.hex() == REAL[name]["snp_ovmf_hash"]
    return digest.value


def needs_file(case):
    """Whether the measured bytes are in no vector, only in a Debian package."""
    return case["image"] in REAL and case["mode"] != "sev-snp"


@pytest.mark.parametrize("case", [case for case in DIGESTS if "digest" in case], ids=lambda case: case["id"])
def test_launch_digests(case):
    assert number(case["vcpu_sig"]) == VCPU_TYPES[case["vcpu_type"]]
    if needs_file(case) and real_file(REAL[case["image"]]) is None:
        pytest.skip(f"SEVLAB_OVMF names no folder with the file of {case['image']}")
    assert launch(case).hex() == case["digest"]


@pytest.mark.long
def test_launch_digests_of_fetched_firmware(monkeypatch):
    """The cases that are skipped elsewhere; a case of another version of the package stays skipped."""
    fetched = subprocess.run([FETCH_OVMF], capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"Debian's OVMF cannot be fetched: {fetched.stderr.strip()[-200:]}")
    monkeypatch.setenv("SEVLAB_OVMF", fetched.stdout.strip())
    cases = [case for case in DIGESTS if "digest" in case and needs_file(case) and real_file(REAL[case["image"]])]
    if not cases:
        pytest.skip("the vectors name no firmware of this version of the package")
    assert {case["id"]: launch(case).hex() for case in cases} == {case["id"]: case["digest"] for case in cases}


@pytest.mark.parametrize("case", [case for case in DIGESTS if "error" in case], ids=lambda case: case["id"])
def test_launches_that_must_fail(case):
    assert number(case["vcpu_sig"]) == VCPU_TYPES[case["vcpu_type"]]
    if case["image"] in REAL:
        assert firmware_of(case["image"]).table  # the refusal follows from table and metadata, not from the file
    with pytest.raises(FormatError) as error:
        launch(case)
    assert error.value.name == case["image"]


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case["id"])
def test_published_launch_digests(case):
    if (case["note"] or "").startswith("DISPUTED"):
        pytest.skip(case["note"])
    if case["mode"] == "snp:svsm":
        assert svsm_digest(case["vcpus"]) == case["digest"]
    elif case["digest"] is None:
        with pytest.raises(FormatError):
            launch(case)
    else:
        assert launch(case).hex() == case["digest"]


def svsm_digest(vcpus):
    svsm = load_json(LAUNCH / "svsm_pages.json")
    digest = LaunchDigest()
    pages = svsm["pages_before_vmsa"] + [svsm["vmsa_page"]] * vcpus
    for page_type, gpa, contents in pages:
        digest.add(page_type, int(gpa, 16), bytes.fromhex(contents))
    return digest.value.hex()


@pytest.mark.parametrize("vcpus", [2, 4])
def test_the_launch_of_a_real_svsm(vcpus):
    assert svsm_digest(vcpus) == load_json(LAUNCH / "svsm_pages.json")["launch_digest"][f"{vcpus}_vcpus"]


@pytest.mark.parametrize("name", TRACE)
def test_every_page_of_a_launch(name):
    (case,) = (case for case in DIGESTS if case["id"] == name)
    firmware = firmware_of(case["image"])
    vmsas = boot_vmsas(
        "qemu",
        case["vcpus"],
        ap_eip=firmware.reset_eip,
        sev_features=number(case["guest_features"]),
        vcpu_signature=number(case["vcpu_sig"]),
    )
    pages = measure_snp(firmware, vmsas=vmsas, hash_table=hash_table_of(case)).pages
    got = [(page.page_type, hex(page.gpa), page.contents.hex(), page.launch_digest.hex()) for page in pages]
    assert TRACE[name]["image"] == case["image"]
    assert got == [(u["page_type"], u["gpa"], u["contents"], u["ld_after"]) for u in TRACE[name]["updates"]]


@pytest.mark.parametrize("case", load_json(LAUNCH / "sev_hashes_table.json"), ids=lambda case: str(case["kernel"]))
def test_kernel_hash_tables(case):
    table = hash_table_of(case)
    assert table.hex() == case["table"]
    assert hashlib.sha384(hash_page(table, 0x80_0C00)).hexdigest() == case["page_at_0xc00_sha384"]


def test_vcpu_signatures():
    assert {name: hex(value) for name, value in VCPU_TYPES.items()} == load_json(LAUNCH / "vcpu_sigs.json")


@pytest.mark.parametrize("name", SYNTHETIC)
def test_images_hold_what_their_recipe_says(name):
    image = SYNTHETIC[name]
    data = (LAUNCH / image["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == image["sha256"]
    if name.startswith("bad_"):
        return
    firmware = parse_firmware(data, name)
    assert hex(firmware.start_gpa) == image["gpa"]
    assert firmware.table == {entry["guid"]: bytes.fromhex(entry["data"]) for entry in image.get("table") or ()}
    recipe = [(m["gpa"], m["size"], m["type"]) for m in image.get("metadata") or ()]
    assert [section[:3] for section in firmware.sections] == recipe


@pytest.mark.parametrize("name", IMAGES["snp_ovmf_hash"])
def test_snp_firmware_digests(name):
    digest = LaunchDigest()
    add_image(digest, firmware_of(name), "firmware")
    assert digest.value.hex() == IMAGES["snp_ovmf_hash"][name]
