"""`sevlab attest session|verify-measurement|secret|verify-chain` as a user meets them."""

from __future__ import annotations

import base64
import hashlib
import json
import stat

import pytest
from click.testing import CliRunner
from sevlab.core import cli
from sevlab.core.errors import ConfigError, FormatError
from sevlab.plugins.sev.crypto import launch_measure

from tests.plugins.sev.test_certificates import platform
from tests.vectors import load_json, vector_set

LEGACY = vector_set("certs") / "legacy"
ROLES = ("ark", "ask", "cek", "oca", "pek", "pdh")
ROME = [LEGACY / f"rome-{role}.cert" for role in ROLES]


def invoke(*arguments):
    return CliRunner().invoke(cli.root, ["attest", *map(str, arguments)])


@pytest.fixture
def simulated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for role, certificate in zip(ROLES, platform(), strict=True):
        (tmp_path / f"{role}.cert").write_bytes(certificate.to_bytes())
    return tmp_path


def test_a_real_chain_verifies_and_a_part_of_it_does_not():
    result = invoke("verify-chain", *ROME)
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "16 checks passed")
    partial = invoke("verify-chain", *ROME[1:])
    assert partial.exit_code == 1
    assert "FAIL  ARK     certificate            missing" in partial.output
    document = json.loads(invoke("verify-chain", *ROME, "--json").output)
    assert document["passed"]


def test_a_simulated_chain_needs_its_root(simulated):
    files = [simulated / f"{role}.cert" for role in ROLES]
    refused = invoke("verify-chain", *files)
    assert refused.exit_code == 1
    assert "FAIL  ARK     root                   an unknown key" in refused.output
    assert invoke("verify-chain", *files, "--ark", "ark.cert").exit_code == 0
    assert isinstance(invoke("verify-chain", *files, "--ark", "ask.cert").exception, ConfigError)


def test_a_session_measurement_and_secret_from_files(simulated):
    files = [simulated / f"{role}.cert" for role in ROLES]
    opened = invoke("session", *files, "--policy", "0x1", "--ark", "ark.cert", "--name", "guest")
    assert opened.exit_code == 0, opened.output
    assert opened.output.split() == ["guest_godh.b64", "guest_session.b64", "guest_tek.bin", "guest_tik.bin"]
    assert len(base64.b64decode((simulated / "guest_session.b64").read_bytes())) == 0x80
    assert len(base64.b64decode((simulated / "guest_godh.b64").read_bytes())) == 0x824
    assert stat.S_IMODE((simulated / "guest_tik.bin").stat().st_mode) == 0o600

    tik = (simulated / "guest_tik.bin").read_bytes()
    digest, mnonce = hashlib.sha256(b"firmware").digest(), bytes(range(16))
    measure = launch_measure(tik, api=(1, 55), build=21, policy=1, launch_digest=digest, mnonce=mnonce)
    blob = base64.b64encode(measure + mnonce).decode()
    options = ("--tik", "guest_tik.bin", "--measurement", blob)
    launch = ("--api-major", 1, "--api-minor", 55, "--policy", 1, "--launch-digest", digest.hex())
    good = invoke("verify-measurement", *options, *launch, "--build-id", 21)
    assert (good.exit_code, good.output.splitlines()[-1]) == (0, "1 check passed")
    bad = invoke("verify-measurement", *options, *launch, "--build-id", 22)
    assert bad.exit_code == 1
    assert f"FAIL  launch  measure                {measure.hex()}" in bad.output

    (simulated / "pass").write_bytes(b"passphrase")
    keys = ("--tek", "guest_tek.bin", *options)
    entry = "736869e5-84f0-4973-92ec-06879ce3da0b:pass"
    sealed = invoke("secret", "header.bin", "payload.bin", *keys, "--secret", entry)
    assert sealed.output == "header.bin (52 bytes), payload.bin (64 bytes)\n"
    raw = simulated / "raw"
    raw.write_bytes(b"r" * 32)
    document = json.loads(invoke("secret", "header.bin", "payload.bin", *keys, "--raw", raw, "--json").output)
    assert document == {"header": "header.bin", "payload": "payload.bin", "secret_bytes": 32}


def test_a_session_with_an_unverified_platform_is_refused_unless_asked(simulated):
    files = [simulated / f"{role}.cert" for role in ROLES]
    refused = invoke("session", *files, "--policy", 1)
    assert refused.exit_code == 1
    assert not (simulated / "launch_tik.bin").exists()
    made = [invoke("session", "pdh.cert", "--policy", 1, "--unverified", "--seed", "s", "--name", n) for n in "ab"]
    assert [result.exit_code for result in made] == [0, 0]
    assert (simulated / "a_session.b64").read_bytes() == (simulated / "b_session.b64").read_bytes()
    invoke("session", "pdh.cert", "--policy", 1, "--unverified", "--name", "c")
    assert (simulated / "c_session.b64").read_bytes() != (simulated / "a_session.b64").read_bytes()
    none = invoke("session", "pek.cert", "--policy", 1, "--unverified")
    assert "0 PDH certificates, expected one" in str(none.exception)
    assert json.loads(invoke("session", "pdh.cert", "--policy", 3, "--unverified", "--json").output)["policy"] == 3


def test_published_measurements_verify(tmp_path):
    cases = [
        c for c in load_json(vector_set("legacy") / "published.json")["published"] if c["kind"] == "launch_measure"
    ]
    assert cases
    for case in cases:
        (tmp_path / "tik").write_bytes(bytes.fromhex(case["tik"]))
        blob = base64.b64encode(bytes.fromhex(case["measure"]) + bytes.fromhex(case["mnonce"])).decode()
        arguments = ["--tik", tmp_path / "tik", "--measurement", blob, "--launch-digest", case["digest"]]
        arguments += ["--api-major", case["api_major"], "--api-minor", case["api_minor"]]
        result = invoke("verify-measurement", *arguments, "--build-id", case["build"], "--policy", case["policy"])
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("session", LEGACY / "rome-pdh.cert"), "Missing option '--policy'"),
        (("session", LEGACY / "rome-pdh.cert", "--policy", "x"), "'x': expected a number such as 1 or 0x10"),
        (("session", LEGACY / "rome-pdh.cert", "--policy", "0x100000000"), "expected 0 to 0xffffffff"),
        (("verify-measurement", "--build-id", "256"), "expected 0 to 255"),
        (("verify-measurement", "--measurement", "!"), "expected base64"),
        (("verify-measurement", "--measurement", "AAAA"), "3 bytes: expected 48, measure and nonce"),
        (("verify-measurement", "--launch-digest", "xy"), "expected hexadecimal digits"),
        (("verify-measurement", "--launch-digest", "00"), "1 bytes: expected 32, as 64 digits"),
        (("secret", "a", "b", "--secret", "x"), "expected GUID:FILE"),
        (("secret", "a", "b", "--secret", "736869e5-84f0-4973-92ec-06879ce3da0b:none"), "'none': no such file"),
    ],
)
def test_wrong_options_are_usage_errors(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_a_secret_needs_something_to_send_and_keys_of_16_bytes(simulated):
    (simulated / "key").write_bytes(bytes(16))
    (simulated / "short").write_bytes(bytes(15))
    blob = base64.b64encode(bytes(48)).decode()
    assert (
        "give --secret at least once, or --raw"
        in invoke("secret", "h", "p", "--tik", "key", "--tek", "key", "--measurement", blob).output
    )
    options = ("--tek", "short", "--measurement", blob, "--raw", "key")
    error = invoke("secret", "h", "p", "--tik", "key", *options).exception
    assert isinstance(error, FormatError)
    assert str(error) == "short: offset 0xf, TEK: expected 16 bytes, found 15 bytes"


def test_a_file_that_cannot_be_written_is_named(simulated):
    result = invoke("session", "pdh.cert", "--policy", 1, "--unverified", "--name", "no/such/folder/x")
    assert isinstance(result.exception, ConfigError)
    assert str(result.exception) == "no/such/folder/x_godh.b64: cannot be written: No such file or directory"


@pytest.mark.parametrize("length", [0, 8, 0x413, 0x823])
def test_a_certificate_that_is_cut_names_file_and_offset(simulated, length):
    cut = simulated / "cut.cert"
    cut.write_bytes((simulated / "pdh.cert").read_bytes()[:length])
    error = invoke("verify-chain", cut).exception
    assert isinstance(error, FormatError)
    assert (error.name, error.offset) == (str(cut), length)
