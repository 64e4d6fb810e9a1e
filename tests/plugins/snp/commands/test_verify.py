"""`sevlab attest verify` and `sevlab show` as a user meets them, on real reports and certificates."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from sevlab.core import cli
from sevlab.core.errors import ConfigError, FormatError
from sevlab.plugins.snp.cert_table import GUIDS, build_cert_table

from tests.vectors import load_json, vector_set

REPORTS = vector_set("reports")
SNP = vector_set("certs") / "snp"
LEGACY = vector_set("certs") / "legacy"
AT = ("--at", "2026-06-01")
CHAINS = {"milan-v2-a": "milan-vcek-a", "milan-v2-b": "milan-vcek-b", "genoa-v5": "genoa-vcek-oak"}
CHAINS |= {"turin-v5": "turin-vcek-oak", "milan-v3-a": "milan-vcek-oak1"}


def invoke(*arguments):
    return CliRunner().invoke(cli.root, list(map(str, arguments)))


def chain_files(name):
    generation = name.split("-")[0]
    return {"vcek": CHAINS[name], "ask": f"{generation}-ask", "ark": f"{generation}-ark"}


@pytest.fixture
def folder(tmp_path):
    for role, name in chain_files("milan-v2-a").items():
        (tmp_path / f"{role}.der").write_bytes((SNP / f"{name}.der").read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", CHAINS)
def test_real_reports_verify_with_the_table_that_a_guest_gets(name, tmp_path):
    table = tmp_path / "certs.bin"
    entries = [(GUIDS[role], (SNP / f"{file}.der").read_bytes()) for role, file in chain_files(name).items()]
    table.write_bytes(build_cert_table([*entries, (GUIDS["crl"], b"ignored")]))
    result = invoke("attest", "verify", "--report", REPORTS / f"{name}.bin", "--table", table, *AT)
    assert result.exit_code == 0, result.output
    assert result.output.endswith("18 checks passed\n")
    assert f"AMD's for {name.split('-')[0].title()}" in result.output


def test_a_folder_of_certificates_and_rules_of_the_owner(folder):
    report = REPORTS / "milan-v2-a.bin"
    options = ("attest", "verify", "--report", report, "--certs", folder, *AT)
    assert invoke(*options, "--policy", "policy.debug=0").exit_code == 0
    refused = invoke(*options, "--policy", "policy.debug=0", "--policy", "reported_tcb.snp>=9")
    assert refused.exit_code == 1
    assert "FAIL  policy  reported_tcb.snp       8" in refused.output
    assert "expected: >= 9" in refused.output
    assert refused.output.endswith("20 checks, 1 failed\n")
    document = json.loads(invoke(*options, "--json").output)
    assert document["passed"]
    assert set(document["checks"][0]) == {"subject", "field", "expected", "got", "passed", "source"}


def test_the_date_counts(folder):
    result = invoke("attest", "verify", "--report", REPORTS / "milan-v2-a.bin", "--certs", folder, "--at", "2031-01-01")
    assert result.exit_code == 1
    assert "FAIL  VCEK    validity" in result.output


def test_another_root_may_be_trusted_instead(folder):
    options = ("attest", "verify", "--report", REPORTS / "milan-v2-a.bin", "--certs", folder, *AT)
    assert invoke(*options, "--ark", SNP / "milan-ark.der").exit_code == 0
    assert invoke(*options, "--ark", SNP / "genoa-ark.der").exit_code == 1


def test_a_wrong_use_is_a_usage_error(folder, tmp_path):
    report = REPORTS / "milan-v2-a.bin"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "give one of --certs and --table" in invoke("attest", "verify", "--report", report).output
    rule = invoke("attest", "verify", "--report", report, "--certs", folder, "--policy", "debug")
    assert (rule.exit_code, "expected FIELD=VALUE" in rule.output) == (2, True)
    assert isinstance(invoke("attest", "verify", "--report", report, "--certs", empty).exception, ConfigError)


@pytest.mark.parametrize("length", [0, 3, 0x4F, 0x2A0, 0x49F])
def test_a_report_that_is_cut_names_file_and_offset(folder, length):
    cut = folder / "cut.bin"
    cut.write_bytes((REPORTS / "milan-v2-a.bin").read_bytes()[:length])
    error = invoke("attest", "verify", "--report", cut, "--certs", folder).exception
    assert isinstance(error, FormatError)
    assert (error.name, error.offset) == (str(cut), length)
    long = folder / "long.bin"
    long.write_bytes((REPORTS / "milan-v2-a.bin").read_bytes() + b"x")
    assert "offset 0x4a0, end: expected no more bytes, found 0x1" in str(invoke("show", "report", long).exception)


# show ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAINS)
def test_show_report(name):
    expected = load_json(REPORTS / "expected.json")["reports"][name]["fields"]
    document = json.loads(invoke("show", "report", REPORTS / f"{name}.bin", "--json").output)
    assert document["generation"] == name.split("-")[0]
    assert document["measurement"] == expected["measurement"]
    assert document["cpuid_family"] == expected["cpuid_family"]
    text = invoke("show", "report", REPORTS / f"{name}.bin").output
    assert f"{'measurement':<40} {expected['measurement']}\n" in text
    assert ("absent" in text) == (name != "turin-v5")


def test_show_cert_reads_the_three_formats():
    sev = json.loads(invoke("show", "cert", LEGACY / "rome-pek.cert", "--json").output)
    assert [(item["role"], item["signature_1"], item["signature_2"]) for item in sev] == [
        ("PEK", "OCA, ECDSA_SHA256", "CEK, ECDSA_SHA256")
    ]
    amd = json.loads(invoke("show", "cert", LEGACY / "rome-ask.cert", "--json").output)
    assert (amd[0]["role"], amd[0]["exponent"]) == ("ASK", 65537)
    vcek = json.loads(invoke("show", "cert", SNP / "milan-vcek-a.der", "--json").output)
    assert (vcek[0]["role"], vcek[0]["serial"], vcek[0]["csp_id"]) == ("VCEK", 0, None)
    assert "role                   PDH" in invoke("show", "cert", LEGACY / "naples-pdh.cert").output


def test_show_chain_says_who_signed_whom(tmp_path):
    both = tmp_path / "ask_ark.cert"
    both.write_bytes((LEGACY / "rome-ask.cert").read_bytes() + (LEGACY / "rome-ark.cert").read_bytes())
    found = json.loads(invoke("show", "chain", LEGACY / "rome-cek.cert", both, "--json").output)
    assert [(row["subject"].split()[0], len(row["signed_by"]), row["root"]) for row in found] == [
        ("CEK", 1, None),
        ("ASK", 1, None),
        ("ARK", 1, "Rome"),
    ]
    text = invoke("show", "chain", LEGACY / "rome-cek.cert", SNP / "milan-ark.der").output
    assert "none of these" in text
    assert "root key of AMD for Milan" in text


def test_show_certtable(tmp_path):
    path = tmp_path / "table"
    path.write_bytes(build_cert_table([(GUIDS["vcek"], b"v"), ("0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0", b"xy")]))
    document = json.loads(invoke("show", "certtable", path, "--json").output)
    assert [(row["kind"], row["data"]) for row in document] == [("vcek", "76"), ("", "7879")]
    assert (
        "unknown  0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0  offset 0x49  2 bytes"
        in invoke("show", "certtable", path).output
    )
    path.write_bytes(path.read_bytes()[:30])
    assert isinstance(invoke("show", "certtable", path).exception, FormatError)
