"""The demo chapter of SEV."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

from sevlab.core.config import GuestConfig, MachineConfig
from sevlab.core.determinism import Entropy
from sevlab.core.events import Data, MemoryRead, Party, Schedule, Space
from sevlab.core.machine import Machine
from sevlab.plugins.sev import driver
from sevlab.plugins.sev.certificates import SevCertificate, Usage, parse_certificates
from sevlab.plugins.sev.chain import verify_chain
from sevlab.plugins.sev.layout import CERTIFICATE_BYTES, CHAIN_BYTES
from sevlab.plugins.sev.numbers import Command, Policy, Status
from sevlab.plugins.sev.owner import Expectation, check_measurement, open_session, seal_secret, secret_table
from sevlab.plugins.sev.vendor import signed_by_vendor, vendor_certificate

FIRMWARE = b"the guest's firmware: it unlocks the disk with the owner's passphrase".ljust(4096, b"\x90")
FIRMWARE_GPA, SECRET_GPA = 0x1000, 0x3000
LUKS = "736869e5-84f0-4973-92ec-06879ce3da0b"
"""GUID of a disk passphrase. Source: edk2; Linux efi_secret."""
SECRETS = ((LUKS, b"correct horse battery staple"),)


def chapter(say: Callable[[str], object]) -> None:
    """An owner launches a guest on a platform that he does not trust beyond the Secure Processor."""
    machine = Machine(MachineConfig(plugins=("sev",), guests=(GuestConfig(memory_bytes=1 << 20),)))
    owner = Entropy(seed=b"the guest's owner")
    vm = machine.hypervisor.vms[0]
    driver.initialise(machine)
    status = driver.need(machine, Command.PLATFORM_STATUS)
    say(f"   INIT: firmware {status.api_major}.{status.api_minor} build {status.build_id}, state {status.state}")

    pdh = _verified_pdh(machine, say)
    policy = int(Policy.NODBG | Policy.NOKS)
    session = open_session(pdh, policy, owner)
    guest = driver.begin_launch(
        machine, 0, policy=policy, dh_certificate=session.certificate.to_bytes(), session=session.session
    )
    say(f"   LAUNCH_START with the owner's session, policy {policy:#x}: handle {guest.handle}, ASID {guest.asid}")
    driver.load(machine, vm, guest, FIRMWARE_GPA, FIRMWARE)
    guest = driver.measure(machine, guest)
    expected = Expectation(status.api_major, status.api_minor, status.build_id, policy, sha256(FIRMWARE).digest())
    (check,) = check_measurement(session.keys.tik, guest.measurement, expected)
    say(f"   LAUNCH_MEASURE {check.got[:32]}...: {'as the owner expects' if check.passed else 'NOT expected'}")

    packet = seal_secret(session.keys, guest.measurement, secret_table(SECRETS), owner)
    broken = packet[0], bytes((packet[1][0] ^ 1,)) + packet[1][1:]
    for what, sent in (("with one bit changed on the way", broken), ("as the owner sealed it", packet)):
        answer = Status(driver.inject_secret(machine, vm, guest, SECRET_GPA, sent))
        say(f"   LAUNCH_SECRET {what}: {answer.name}")
    driver.need(machine, Command.LAUNCH_FINISH, handle=guest.handle)
    machine.apply(Schedule())
    say("   LAUNCH_FINISH, VMRUN: the guest runs\n")
    _show_secret(machine, say)


def _verified_pdh(machine: Machine, say: Callable[[str], object]) -> SevCertificate:
    """The platform's PDH, after its chain up to the vendor was checked."""
    page = driver.scratch_page(machine) + 4096
    driver.need(
        machine,
        Command.PDH_CERT_EXPORT,
        pdh_spa=page,
        pdh_bytes=CERTIFICATE_BYTES,
        chain_spa=page + 4096,
        chain_bytes=CHAIN_BYTES,
    )
    pdh = SevCertificate.from_bytes(driver.get(machine, page, CERTIFICATE_BYTES))
    exported = [item for _, item in parse_certificates(driver.get(machine, page + 4096, CHAIN_BYTES))]
    pek, oca, cek = (item for item in exported if isinstance(item, SevCertificate))
    generation = machine.config.generation
    ark, ask = vendor_certificate(generation, Usage.ARK), vendor_certificate(generation, Usage.ASK)
    checks = verify_chain([pdh, pek, oca, signed_by_vendor(cek, generation), ask, ark], trusted_ark=ark)
    passed = sum(check.passed for check in checks)
    say(f"   PDH_CERT_EXPORT: PDH <- PEK <- CEK <- ASK <- ARK, {passed} of {len(checks)} checks pass")
    return pdh


def _show_secret(machine: Machine, say: Callable[[str], object]) -> None:
    spa = machine.hypervisor.vms[0].memory_spa + SECRET_GPA
    views = (
        ("guest, C=1", MemoryRead(Party.GUEST, 0, Space.GPA, SECRET_GPA, True, 64)),
        ("hypervisor", MemoryRead(Party.HYPERVISOR, 0, Space.SPA, spa, False, 64)),
        ("device DMA", MemoryRead(Party.DMA, 0, Space.SPA, spa, False, 64)),
    )
    for who, step in views:
        data = machine.apply(step).first(Data)
        if data is not None:
            say(f"   the secret's page  {who:<10}  {data.data[36:].hex()[:32]}...  {_text(data.data[40:])}")


def _text(data: bytes) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 else "·" for byte in data)  # printable ASCII
