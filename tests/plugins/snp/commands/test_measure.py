"""`sevlab measure` as a user meets it."""

from __future__ import annotations

import base64
import json

import pytest
from click.testing import CliRunner
from sevlab.core import cli
from sevlab.core.errors import FormatError

from tests.plugins.snp.test_firmware import ENTRIES, GOOD, SECTIONS, image
from tests.vectors import load_json, vector_set

LAUNCH = vector_set("launch")
FULL = str(LAUNCH / "images/full.bin")
FULL_SNP = "5581dcdce03165b15cc2be4299113e6d200991c69206e2f2e764ab968d4b882f1fd04d2fc8d3a90a86280b2bdf6aae53"


def invoke(*arguments):
    return CliRunner().invoke(cli.root, ["measure", *map(str, arguments)], catch_exceptions=True)


def digest_of(*arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return result.output.strip()


def a_case(mode, **fields):
    cases = load_json(LAUNCH / "digests.json")["cases"]
    chosen = {"image": "full", "kernel": None, "vmm": "QEMU"} | fields
    return next(
        case
        for case in cases
        if case["mode"] == mode and "digest" in case and all(case[name] == value for name, value in chosen.items())
    )


@pytest.mark.parametrize(("mode", "option"), [("sev", "sev"), ("sev-es", "seves"), ("sev-snp", "snp")])
def test_the_command_gives_the_vectors_digest(mode, option):
    case = a_case(mode)
    options = ["--mode", option, "--ovmf", FULL, "--vcpus", case["vcpus"]]
    options += ["--guest-features", case["guest_features"]] if mode == "sev-snp" else []
    assert digest_of(*options, "--vcpu-type", case["vcpu_type"]) == case["digest"]
    assert digest_of(*options, "--vcpu-sig", case["vcpu_sig"]) == case["digest"]


SNP = ("--mode", "snp", "--ovmf", FULL, "--vcpus", "1")


def test_each_way_to_name_the_vcpu_and_each_format():
    base = digest_of(*SNP, "--vcpu-type", "EPYC-Milan")
    assert digest_of(*SNP, "--vcpu-sig", "0xa00f11") == base
    assert digest_of(*SNP, "--vcpu-family", 25, "--vcpu-model", 1, "--vcpu-stepping", 1) == base
    assert base64.b64decode(digest_of(*SNP, "--vcpu-sig", "10489617", "--output-format", "base64")).hex() == base
    verbose = digest_of(*SNP, "--vcpu-sig", "0xa00f11", "-v")
    assert verbose == f"Calculated SEV_SNP guest measurement: {base}"
    start = digest_of("--mode", "snp:ovmf-hash", "--ovmf", FULL)
    assert digest_of(*SNP, "--vcpu-sig", "0xa00f11", "--snp-ovmf-hash", start) == base


def test_a_kernel_initrd_and_command_line_change_the_digest(tmp_path):
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    kernel.write_bytes(b"kernel")
    initrd.write_bytes(b"initrd")
    options = (*SNP, "--vcpu-type", "EPYC-v4")
    digests = [
        digest_of(*options),
        digest_of(*options, "--kernel", kernel),
        digest_of(*options, "--kernel", kernel, "--append", "console=ttyS0"),
        digest_of(*options, "--kernel", kernel, "--initrd", initrd),
    ]
    assert len(set(digests)) == 4
    assert digests[0] == FULL_SNP


def test_json_lists_every_page_and_leads_to_the_digest():
    trace = load_json(LAUNCH / "snp_update_trace.json")["ld-p-0024"]["updates"]
    document = json.loads(digest_of(*SNP, "--vcpu-type", "EPYC-v4", "--json"))
    assert document["pages"][-1]["launch_digest"] == document["launch_digest"] == FULL_SNP
    assert [page["gpa"] for page in document["pages"]] == [update["gpa"] for update in trace]
    assert document["pages"][0]["page_type"] == "NORMAL"
    sev = json.loads(digest_of("--mode", "seves", "--ovmf", FULL, "--vcpus", 2, "--vcpu-type", "EPYC-v4", "--json"))
    assert len(sev["pages"]) == 16 + 2
    assert sev["pages"][-1]["launch_digest"] == sev["launch_digest"]


def test_vmsas_are_written_to_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digest_of("--mode", "seves", "--ovmf", FULL, "--vcpus", 2, "--vcpu-type", "EPYC-v4", "--dump-vmsa")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["vmsa0.bin", "vmsa1.bin"]
    assert {len(path.read_bytes()) for path in tmp_path.iterdir()} == {4096}


def test_an_svsm_needs_the_size_of_the_variables(tmp_path):
    ovmf, svsm, variables = tmp_path / "ovmf", tmp_path / "svsm", tmp_path / "vars"
    ovmf.write_bytes(image([]))
    svsm.write_bytes(GOOD)
    variables.write_bytes(bytes(0x84000))
    options = ("--mode", "snp:svsm", "--ovmf", ovmf, "--svsm", svsm, "--vcpus", 2, "--vcpu-type", "EPYC-v4")
    first = digest_of(*options, "--vars-size", 0x84000)
    assert digest_of(*options, "--vars-file", variables) == first
    assert digest_of(*options, "--vars-size", "0x85000") != first
    assert "one of --vars-size and --vars-file" in invoke(*options).output
    assert invoke(*options, "--vars-size", 0x84000, "--vars-file", variables).exit_code == 2
    assert "do not fit" in str(invoke(*options, "--vars-size", 1 << 32).exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--mode and --ovmf are needed"),
        (("--mode", "snp"), "--mode and --ovmf are needed"),
        (("--mode", "snp", "--ovmf", FULL, "--vcpu-type", "EPYC"), "mode snp needs --vcpus"),
        (("--mode", "snp", "--ovmf", FULL, "--vcpus", "0"), "0 is not in the range"),
        ((*SNP,), "mode snp needs --vcpu-type, --vcpu-sig or --vcpu-family"),
        ((*SNP, "--vcpu-sig", "x"), "'x': expected a number such as 18 or 0x12"),
        ((*SNP, "--vcpu-family", "25"), "--vcpu-family, --vcpu-model and --vcpu-stepping go together"),
        ((*SNP, "--append", "quiet"), "--initrd and --append need --kernel"),
        ((*SNP, "--vcpu-sig", "1", "--snp-ovmf-hash", "12"), "1 bytes: expected 48, as 96 digits"),
        ((*SNP, "--vcpu-sig", "1", "--snp-ovmf-hash", "zz"), "expected hexadecimal digits"),
        (("--mode", "sev", "--ovmf", FULL, "--snp-ovmf-hash", "0" * 96), "--snp-ovmf-hash is for mode snp"),
        (("--mode", "sev", "--ovmf", FULL, "--dump-vmsa"), "an SEV guest has no VMSA"),
        (("--mode", "snp:svsm", "--ovmf", FULL, "--vcpus", "1", "--guest-features", "0x21"), "has guest features 0x1"),
    ],
)
def test_options_that_do_not_fit_are_usage_errors(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.parametrize("length", [0, 1, 50, 0x1C08, 0x1FCE, 0x1FFF])
def test_an_image_that_is_cut_names_file_offset_and_field(tmp_path, length):
    cut = tmp_path / "cut.fd"
    cut.write_bytes(GOOD[:length])
    result = invoke("--mode", "snp", "--ovmf", cut, "--vcpus", 1, "--vcpu-type", "EPYC")
    assert isinstance(result.exception, FormatError)
    assert result.exception.name == str(cut)


def test_two_launches_are_compared_page_by_page(tmp_path):
    one, two, three = (tmp_path / name for name in ("one.json", "two.json", "three.json"))
    one.write_text(digest_of(*SNP, "--vcpu-type", "EPYC-v4", "--json"))
    two.write_text(digest_of("--mode", "snp", "--ovmf", FULL, "--vcpus", 2, "--vcpu-type", "EPYC-Milan", "--json"))
    same = invoke("diff", one, one)
    assert (same.exit_code, same.output) == (0, "the same 48 pages\n")
    other = invoke("diff", one, two)
    assert other.exit_code == 1
    lines = other.output.splitlines()
    assert lines[0] == "the launch digests part at page 47 (of 48 and 49):"
    assert "VMSA of vCPU 0" in lines[1]
    assert "absent" in lines[2]
    document = json.loads(invoke("diff", one, two, "--json").output)
    assert document["first_differing_page"] == 47
    assert [page["number"] for page in document["pages"]] == [47, 48]
    swapped = tmp_path / "image.fd"
    swapped.write_bytes(image(ENTRIES, sections=[SECTIONS[1], SECTIONS[0], *SECTIONS[2:]]))
    plain = tmp_path / "plain.fd"
    plain.write_bytes(GOOD)
    for path, out in ((swapped, two), (plain, three)):
        out.write_text(digest_of("--mode", "snp", "--ovmf", path, "--vcpus", 1, "--vcpu-type", "EPYC", "--json"))
    assert "page" in invoke("diff", two, three).output


PAGE = '{"pages": [{"part": "", "page_type": [], "gpa": null, "contents": "", "launch_digest": ""}]}'


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"pages": 1}', '{"pages": [1]}', '{"pages": [{"gpa": 5}]}', "\xff", PAGE]
)
def test_a_file_that_is_no_measurement_is_refused(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    result = invoke("diff", path, path)
    assert isinstance(result.exception, FormatError)
    assert str(path) in str(result.exception)
