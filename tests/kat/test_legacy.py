"""SEV's sessions, measurements, secrets and key derivation against published and independently computed answers."""

from __future__ import annotations

import base64

import pytest
from sevlab.plugins.sev import crypto
from sevlab.plugins.sev.crypto import Context, Point, TransportKeys
from sevlab.plugins.sev.layout import Session

from tests.vectors import load_json, vector_set

FOLDER = vector_set("legacy")
CASES = [*load_json(FOLDER / "published.json")["published"], *load_json(FOLDER / "generated.json")["cases"]]

FLIPS = {
    "published.json": ("out", "wrap_tk", "wrap_mac", "policy_mac", "measure", "blob_base64", "header", "ciphertext"),
    "generated.json": (
        "out",
        "master_secret",
        "kek",
        "kik",
        "z_big_endian",
        "wrap_tk",
        "wrap_mac",
        "policy_mac",
        "session_buffer",
        "platform_pdh_x",
        "guest_dh_y",
        "measure",
        "header",
        "ciphertext",
        "plaintext",
        "expect",
    ),
}


def of_kind(kind):
    chosen = [case for case in CASES if case["kind"] == kind]
    return pytest.mark.parametrize("case", chosen, ids=range(len(chosen)))


def of(case, name):
    return bytes.fromhex(case[name])


@of_kind("kdf")
def test_kdf(case):
    length = case.get("out_len", len(case["out"]) // 2)
    assert crypto.kdf(of(case, "key"), case["label"].encode(), of(case, "context"), length) == of(case, "out")


@of_kind("session")
def test_session(case):
    shared = of(case, "z") if "z" in case else of(case, "z_big_endian")
    if "guest_dh_private" in case:
        sides = {
            side: (int(case[f"{side}_private"], 16), Point(int(case[f"{side}_x"], 16), int(case[f"{side}_y"], 16)))
            for side in ("platform_pdh", "guest_dh")
        }
        for scalar, point in sides.values():
            assert crypto.public_point(scalar) == point
        (own, own_point), (other, other_point) = sides.values()
        assert crypto.ecdh(own, other_point) == crypto.ecdh(other, own_point) == shared
        master = crypto.master_secret(shared, of(case, "nonce"))
        assert master == of(case, "master_secret")
        assert crypto.kdf(master, crypto.LABEL_KEK, b"", 16) == of(case, "kek")
        assert crypto.kdf(master, crypto.LABEL_KIK, b"", 16) == of(case, "kik")
    keys = TransportKeys(of(case, "tek"), of(case, "tik"))
    buffer = crypto.wrap_session(shared, of(case, "nonce"), of(case, "wrap_iv"), keys, case["policy"])
    session = Session.from_bytes(buffer)
    for name in ("nonce", "wrap_tk", "wrap_iv", "wrap_mac", "policy_mac"):
        assert getattr(session, name) == of(case, name), name
    if "session_buffer" in case:
        assert buffer == of(case, "session_buffer")
    assert crypto.unwrap_session(shared, session) == keys
    assert crypto.policy_mac_is_right(keys.tik, case["policy"], session.policy_mac)


@of_kind("launch_measure")
def test_launch_measure(case):
    measure = crypto.launch_measure(
        of(case, "tik"),
        api=(case["api_major"], case["api_minor"]),
        build=case["build"],
        policy=case["policy"],
        launch_digest=of(case, "digest"),
        mnonce=of(case, "mnonce"),
    )
    assert measure == of(case, "measure")
    if "blob_base64" in case:
        assert base64.b64decode(case["blob_base64"]) == measure + of(case, "mnonce")


@of_kind("launch_secret")
def test_launch_secret(case):
    keys = TransportKeys(of(case, "tek"), of(case, "tik"))
    measure, header, ciphertext = of(case, "measure"), of(case, "header"), of(case, "ciphertext")
    opened = crypto.open_packet(keys, Context.LAUNCH_SECRET, header, ciphertext, measure=measure)
    expect = case.get("expect")
    assert expect in {None, "bad_measurement_or_mac"}
    if expect is not None:
        assert opened is None
        return
    plaintext = of(case, "plaintext")
    assert opened == plaintext
    sealed = crypto.seal_packet(
        keys, Context.LAUNCH_SECRET, plaintext, iv=of(case, "iv"), measure=measure, flags=case["flags"]
    )
    assert sealed == (header, ciphertext)
