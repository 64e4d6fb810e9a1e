"""NIST CAVP AES-XTS vectors through `core.crypto`; the other NIST sets belong to the plugins that use them."""

from __future__ import annotations

import pytest
from sevlab.core.crypto import aes_xts

from tests.vectors import load_json, vector_set

XTS = load_json(vector_set("nist") / "aes_xts.json")

FLIPS = {"aes_xts.json": ("key", "tweak", "pt", "ct")}


@pytest.mark.parametrize("direction", ["encrypt", "decrypt"])
def test_aes_xts_agrees_with_nist(direction):
    failed = []
    for number, case in enumerate(XTS):
        plain, cipher = bytes.fromhex(case["pt"]), bytes.fromhex(case["ct"])
        source, expected = (plain, cipher) if direction == "encrypt" else (cipher, plain)
        key, tweak = bytes.fromhex(case["key"]), bytes.fromhex(case["tweak"])
        if aes_xts(key, tweak, source, decrypt=direction == "decrypt") != expected:
            failed.append((number, case["file"]))
    assert not failed
    assert XTS
