"""The digests of independent measurement tools come out of the Secure Processor when it loads the same bytes."""

from __future__ import annotations

import pytest
from sevlab.core.config import GuestConfig
from sevlab.core.testing import make_machine
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, Policy, driver

from tests.vectors import load_json, vector_set

LAUNCH = vector_set("launch")
PUBLISHED = load_json(vector_set("legacy") / "published.json")["published"]
FIRMWARE = (LAUNCH / "fixtures/sevctl_OVMF.amdsev.fd_trimmed.bin").read_bytes()
VMSAS = [(LAUNCH / f"fixtures/sevctl_vmsa{number}.bin").read_bytes() for number in (0, 1)]
CASES = {
    "sha256(OVMF.amdsev.fd_trimmed)": (Policy(0), []),
    "sha256(fw || vmsa0 || 3 x vmsa1)": (Policy.ES, [VMSAS[0], *[VMSAS[1]] * 3]),
}


@pytest.mark.parametrize(
    "case", [c for c in PUBLISHED if c.get("digest_input") in CASES], ids=lambda c: c["digest_input"]
)
def test_a_real_launch_has_the_published_digest(case):
    policy, vmsas = CASES[case["digest_input"]]
    machine = make_machine("sev", guests=(GuestConfig(memory_bytes=1 << 20, vcpus=4),))
    guest = sev.launch_guest(machine, 0, policy=policy, loads={0xF000: FIRMWARE}, vmsas=vmsas)
    assert sev.sev_state(machine).guests[guest.handle].launch_digest.hex() == case["digest"]


def test_the_digest_is_what_attestation_reports():
    machine = make_machine("sev", guests=(GuestConfig(memory_bytes=1 << 20, vcpus=4),))
    policy, vmsas = CASES["sha256(fw || vmsa0 || 3 x vmsa1)"]
    guest = sev.launch_guest(machine, 0, policy=policy, loads={0xF000: FIRMWARE}, vmsas=vmsas)
    page = driver.scratch_page(machine) + 4096
    sev.need(machine, Command.ATTESTATION, handle=guest.handle, spa=page, length=0xD0)
    digest = next(c["digest"] for c in PUBLISHED if c.get("digest_input") == "sha256(fw || vmsa0 || 3 x vmsa1)")
    assert driver.get(machine, page + 0x10, 32).hex() == digest
