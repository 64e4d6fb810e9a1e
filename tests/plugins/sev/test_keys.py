"""The platform's keys: made, kept, exported, owned; firmware images and the chip's identity."""

from __future__ import annotations

import pytest
from sevlab.core.testing import make_machine
from sevlab.plugins import sev
from sevlab.plugins.sev import Command, GuestState, Status, crypto, driver
from sevlab.plugins.sev.certificates import SIGNED_BYTES, SevCertificate, Slot, Usage, parse_certificates, usage_of
from sevlab.plugins.sev.chain import make_certificate, signature_verifies, signed_by, verify_chain
from sevlab.plugins.sev.firmware import FirmwareHeader, make_image
from sevlab.plugins.sev.layout import CERTIFICATE_BYTES, CHAIN_BYTES
from sevlab.plugins.sev.nvram import NV_AREA_BYTES, STORED_BYTES
from sevlab.plugins.sev.vendor import signed_by_vendor, vendor_certificate
from sevlab.plugins.sme import sme_state

from tests.plugins.sev.world import PAGE, World, rejected

OWNER = 0x00C0_FFEE


@pytest.fixture(scope="module")
def fresh():
    made = World()
    made.machine.mark()
    return made


@pytest.fixture
def world(fresh):
    yield fresh
    fresh.machine.reset()


def identity(world):
    return sev.sev_state(world.machine).identity


def test_the_exported_chain_leads_from_the_pdh_to_the_vendor(world):
    pdh, chain = world.export()
    pek, oca, cek = (certificate for _, certificate in parse_certificates(chain))
    assert [usage_of(certificate) for certificate in (pek, oca, cek)] == [Usage.PEK, Usage.OCA, Usage.CEK]
    generation = world.machine.config.generation
    ark, ask = vendor_certificate(generation, Usage.ARK), vendor_certificate(generation, Usage.ASK)
    signed = signed_by_vendor(cek, generation)
    checks = verify_chain([SevCertificate.from_bytes(pdh), pek, oca, signed, ask, ark], trusted_ark=ark)
    assert all(check.passed for check in checks), [check for check in checks if not check.passed]
    assert not signature_verifies(ask, cek)


def test_each_length_of_an_export_is_told(world):
    for fields in ({}, {"pdh_bytes": PAGE}, {"chain_bytes": 2 * PAGE}):
        reply = world.run(Command.PDH_CERT_EXPORT, **fields)
        assert (reply.status, reply.buffer.pdh_bytes, reply.buffer.chain_bytes) == (
            0x04,
            CERTIFICATE_BYTES,
            CHAIN_BYTES,
        )
    fields = world.fields(Command.PDH_CERT_EXPORT) | {"chain_spa": 1 << 46}
    assert rejected(world.machine, Command.PDH_CERT_EXPORT, **fields) == Status.INVALID_ADDRESS


def test_the_same_seed_gives_the_same_keys_and_another_seed_others():
    chains = [World(seed=seed).export() for seed in (b"a", b"a", b"b")]
    assert chains[0] == chains[1]
    assert chains[0][0] != chains[2][0]


def test_pek_gen_replaces_all_three_and_pdh_gen_only_the_last(world):
    before = world.export()
    world.need(Command.PDH_GEN)
    middle = world.export()
    assert middle[0] != before[0]
    assert middle[1] == before[1]
    world.need(Command.PEK_GEN)
    after = world.export()
    for start in (0, CERTIFICATE_BYTES):
        assert after[1][start : start + CERTIFICATE_BYTES] != middle[1][start : start + CERTIFICATE_BYTES]
    assert after[1][2 * CERTIFICATE_BYTES :] == before[1][2 * CERTIFICATE_BYTES :]


def test_keys_outlive_a_shutdown_in_the_flash_until_a_reset(world):
    before = world.export()
    world.need(Command.SHUTDOWN)
    world.need(Command.INIT)
    assert world.export() == before
    world.need(Command.SHUTDOWN)
    world.need(Command.PLATFORM_RESET)
    world.need(Command.INIT)
    after = world.export()
    assert after[0] != before[0]
    assert after[1][2 * CERTIFICATE_BYTES :] == before[1][2 * CERTIFICATE_BYTES :]


def test_damaged_flash_is_noticed_and_erased(world):
    state = sev.sev_state(world.machine)
    world.need(Command.SHUTDOWN)
    for place in (0, len(state.spi) // 2, len(state.spi) - 40):
        kept = state.spi
        state.spi = kept[:place] + bytes((kept[place] ^ 1,)) + kept[place + 1 :]
        assert world.run(Command.INIT).status == Status.SECURE_DATA_INVALID
        assert state.spi == b""
        state.spi = kept
    world.need(Command.INIT)


# INIT_EX ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def area(world):
    world.need(Command.SHUTDOWN)
    spa = world.machine.hypervisor.allocate_pages(NV_AREA_BYTES // PAGE)
    driver.put(world.machine, spa, b"\xff" * NV_AREA_BYTES)
    return spa


def init_ex(world, spa, **changes):
    return {"length": 0x24, "nv_spa": spa, "nv_bytes": NV_AREA_BYTES} | changes


def test_init_ex_keeps_the_keys_in_the_area(world, area):
    world.need(Command.INIT_EX, **init_ex(world, area))
    before = world.export()
    stored = driver.get(world.machine, area, NV_AREA_BYTES)
    assert stored[:4] != b"\xff" * 4
    assert stored[STORED_BYTES:] == b"\xff" * (NV_AREA_BYTES - STORED_BYTES)
    world.need(Command.SHUTDOWN)
    world.need(Command.INIT_EX, **init_ex(world, area))
    assert world.export() == before
    world.need(Command.PDH_GEN)
    assert driver.get(world.machine, area, NV_AREA_BYTES) != stored


def test_a_damaged_area_is_erased(world, area):
    world.need(Command.INIT_EX, **init_ex(world, area))
    world.need(Command.SHUTDOWN)
    driver.put(world.machine, area + 0x100, b"damage")
    assert world.run(Command.INIT_EX, **init_ex(world, area)).status == Status.SECURE_DATA_INVALID
    assert driver.get(world.machine, area, NV_AREA_BYTES) == b"\xff" * NV_AREA_BYTES
    world.need(Command.INIT_EX, **init_ex(world, area))


def test_another_chip_cannot_read_the_area(world, area):
    world.need(Command.INIT_EX, **init_ex(world, area))
    stored = driver.get(world.machine, area, NV_AREA_BYTES)
    other = World(seed=b"another chip")
    other.need(Command.SHUTDOWN)
    spa = other.machine.hypervisor.allocate_pages(NV_AREA_BYTES // PAGE)
    driver.put(other.machine, spa, stored)
    assert other.run(Command.INIT_EX, **init_ex(other, spa)).status == Status.SECURE_DATA_INVALID


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"length": 0x23}, Status.INVALID_LENGTH),
        ({"nv_spa": 0x800}, Status.INVALID_ADDRESS),
        ({"nv_spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"nv_bytes": NV_AREA_BYTES - 1}, Status.INVALID_LENGTH),
        ({"reserved": 1}, Status.INVALID_CONFIG),
        ({"reserved_flags": 1}, Status.INVALID_CONFIG),
        ({"reserved": 1, "length": 0}, Status.INVALID_CONFIG),
        ({"es": 1, "tmr_spa": 0x1000, "tmr_bytes": 1 << 20}, Status.INVALID_ADDRESS),
        ({"es": 1, "tmr_spa": 1 << 20, "tmr_bytes": 1 << 19}, Status.INVALID_LENGTH),
        ({"es": 1, "tmr_spa": 1 << 46, "tmr_bytes": 1 << 20}, Status.INVALID_ADDRESS),
    ],
)
def test_init_ex_answers_the_first_thing_that_is_wrong(world, area, change, status):
    assert rejected(world.machine, Command.INIT_EX, **init_ex(world, area, **change)) == status


def test_the_tmr_may_not_overlap_the_area(world, area):
    fields = init_ex(world, area, es=1, tmr_spa=area & -(1 << 20), tmr_bytes=1 << 20)
    assert rejected(world.machine, Command.INIT_EX, **fields) == Status.INVALID_ADDRESS


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"reserved_flags": 1 << 30}, Status.INVALID_CONFIG),
        ({"reserved": 1}, Status.INVALID_CONFIG),
        ({"es": 1}, Status.INVALID_LENGTH),
        ({"es": 1, "tmr_spa": 0x8_0000, "tmr_bytes": 1 << 20}, Status.INVALID_ADDRESS),
        ({"es": 1, "tmr_spa": 1 << 20, "tmr_bytes": 1 << 21}, Status.INVALID_LENGTH),
        ({"es": 1, "tmr_spa": 1 << 46, "tmr_bytes": 1 << 20}, Status.INVALID_ADDRESS),
    ],
)
def test_init_answers_the_first_thing_that_is_wrong(world, change, status):
    world.need(Command.SHUTDOWN)
    assert rejected(world.machine, Command.INIT, **change) == status


def test_init_needs_memory_encryption():
    machine = make_machine("sev")
    assert rejected(machine, Command.INIT, reserved=1) == Status.HWERROR_PLATFORM


def test_snp_en_asks_for_an_initialised_rmp_before_init(world):
    world.need(Command.SHUTDOWN)
    sme_state(world.machine).syscfg |= 1 << 24
    assert rejected(world.machine, Command.INIT) == Status.INVALID_PLATFORM_STATE
    sev.sev_state(world.machine).rmp_initialised = True
    world.need(Command.INIT)


def test_commands_keep_out_of_the_trusted_region(world):
    tmr = sev.sev_state(world.machine).tmr
    for spa in (tmr.spa, tmr.spa + tmr.length_bytes - 16, tmr.spa - 16):
        fields = {"spa": spa, "length": CERTIFICATE_BYTES}
        assert rejected(world.machine, Command.PEK_CSR, **fields) == Status.INVALID_ADDRESS
    world.need(Command.PEK_CSR, spa=tmr.spa - CERTIFICATE_BYTES, length=CERTIFICATE_BYTES)


# Ownership ----------------------------------------------------------------------------------------------------------


def own_oca(scalar=OWNER):
    unsigned = make_certificate(Usage.OCA, crypto.public_point(scalar), api=(1, 55))
    return signed_by(unsigned, Slot.FIRST, Usage.OCA, scalar)


def csr_of(world):
    world.need(Command.PEK_CSR, spa=world.place(6), length=PAGE)
    return SevCertificate.from_bytes(driver.get(world.machine, world.place(6), CERTIFICATE_BYTES))


def import_fields(world, pek, oca):
    return {
        "pek_spa": world.put(6, pek.to_bytes()),
        "pek_bytes": CERTIFICATE_BYTES,
        "oca_spa": world.put(7, oca.to_bytes()),
        "oca_bytes": CERTIFICATE_BYTES,
    }


def test_the_csr_is_the_pek_without_signatures(world):
    csr = csr_of(world)
    assert csr.to_bytes()[:SIGNED_BYTES] == identity(world).pek_certificate[:SIGNED_BYTES]
    assert (csr.sig_1_usage, csr.sig_2_usage) == (Usage.INVALID, Usage.INVALID)
    assert not any(csr.sig_1 + csr.sig_2)
    reply = world.run(Command.PEK_CSR)
    assert (reply.status, reply.buffer.length) == (Status.INVALID_LENGTH, CERTIFICATE_BYTES)


def test_an_external_owner_signs_the_pek_and_the_cek_keeps_its_signature(world):
    before = world.export()
    pek = signed_by(csr_of(world), Slot.FIRST, Usage.OCA, OWNER)
    world.need(Command.PEK_CERT_IMPORT, **import_fields(world, pek, own_oca()))
    pdh, chain = world.export()
    new_pek, oca, cek = (certificate for _, certificate in parse_certificates(chain))
    assert signature_verifies(oca, new_pek)
    assert signature_verifies(cek, new_pek)
    assert signature_verifies(new_pek, SevCertificate.from_bytes(pdh))
    assert pdh != before[0]
    assert world.need(Command.PLATFORM_STATUS).owner == 1
    fields = import_fields(world, pek, own_oca())
    assert rejected(world.machine, Command.PEK_CERT_IMPORT, **fields) == Status.ALREADY_OWNED
    assert rejected(world.machine, Command.PEK_CERT_IMPORT) == Status.ALREADY_OWNED
    world.need(Command.SHUTDOWN)
    world.need(Command.INIT)
    assert world.need(Command.PLATFORM_STATUS).owner == 1
    world.need(Command.PEK_GEN)
    assert world.need(Command.PLATFORM_STATUS).owner == 0


def test_import_refuses_what_is_not_the_owners_or_not_ours(world):
    csr, oca = csr_of(world), own_oca()
    other = make_certificate(Usage.PEK, crypto.public_point(5), api=(1, 55))
    signed = signed_by(csr, Slot.FIRST, Usage.OCA, OWNER)
    cases = [
        (signed, own_oca(OWNER).replace(api_minor=54), Status.BAD_SIGNATURE),
        (signed_by(csr, Slot.FIRST, Usage.OCA, OWNER + 1), oca, Status.BAD_SIGNATURE),
        (signed.replace(sig_1_algo=0), oca, Status.BAD_SIGNATURE),
        (csr, oca, Status.INVALID_CERTIFICATE),
        (signed_by(other, Slot.FIRST, Usage.OCA, OWNER), oca, Status.INVALID_CERTIFICATE),
        (signed, csr, Status.INVALID_CERTIFICATE),
        (signed_by(signed, Slot.SECOND, Usage.OCA, OWNER), oca, Status.INVALID_CERTIFICATE),
    ]
    for pek, authority, status in cases:
        assert rejected(world.machine, Command.PEK_CERT_IMPORT, **import_fields(world, pek, authority)) == status


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"pek_bytes": CERTIFICATE_BYTES + 1}, Status.INVALID_LENGTH),
        ({"oca_bytes": CERTIFICATE_BYTES - 1}, Status.INVALID_LENGTH),
        ({"pek_spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"oca_spa": 1 << 46}, Status.INVALID_ADDRESS),
    ],
)
def test_import_checks_lengths_and_addresses_first(world, change, status):
    fields = import_fields(world, csr_of(world), own_oca()) | change
    assert rejected(world.machine, Command.PEK_CERT_IMPORT, **fields) == status


# Identity and firmware ----------------------------------------------------------------------------------------------


def test_get_id_is_a_point_for_each_socket():
    machine = make_machine("sev", options={"sev": {"sockets": 2}})
    page = driver.scratch_page(machine) + PAGE
    reply = sev.run(machine, Command.GET_ID, spa=page, length=0)
    assert (reply.status, reply.buffer.length) == (Status.INVALID_LENGTH, 64)
    lengths = [sev.need(machine, Command.GET_ID, spa=page, length=length).length for length in (64, 127, 128, 129)]
    assert lengths == [64, 64, 128, 64]
    sev.need(machine, Command.GET_ID, spa=page, length=128)
    both = driver.get(machine, page, 128)
    assert both[:64] != both[64:]
    prime = (1 << 256) - (1 << 32) - 977
    for start in (0, 64):
        x, y = (int.from_bytes(both[at : at + 32], "little") for at in (start, start + 32))
        assert (y * y - x**3 - 7) % prime == 0


def test_one_socket_has_one_identity():
    machine = make_machine("sev")
    page = driver.scratch_page(machine) + PAGE
    assert sev.need(machine, Command.GET_ID, spa=page, length=128).length == 64


def test_downloaded_firmware_tells_its_version(world):
    world.need(Command.SHUTDOWN)
    image = make_image("milan", (1, 60, 7))
    world.need(Command.DOWNLOAD_FIRMWARE, spa=world.put(4, image), length=len(image))
    status = world.need(Command.PLATFORM_STATUS)
    assert (status.api_major, status.api_minor, status.build_id, status.state) == (1, 60, 7, 0)


@pytest.mark.parametrize("place", [0x10, 0x14, 0x61, 0x6C, 0x100, 0x1100, 0x12FF])
def test_each_part_of_an_image_is_signed(world, place):
    world.need(Command.SHUTDOWN)
    image = bytearray(make_image("milan", (1, 60, 7)))
    image[place] ^= 1
    fields = {"spa": world.put(4, bytes(image)), "length": len(image)}
    assert rejected(world.machine, Command.DOWNLOAD_FIRMWARE, **fields) == Status.BAD_SIGNATURE


def test_an_image_of_another_generation_or_too_long_or_misplaced_is_refused(world):
    world.need(Command.SHUTDOWN)
    image = make_image("genoa", (1, 60, 7))
    fields = {"spa": world.put(4, image), "length": len(image)}
    assert rejected(world.machine, Command.DOWNLOAD_FIRMWARE, **fields) == Status.BAD_SIGNATURE
    for change, status in (
        ({"spa": world.place(4) + 16}, Status.INVALID_ADDRESS),
        ({"spa": 1 << 46}, Status.INVALID_ADDRESS),
        ({"length": (128 << 10) + 1}, Status.INVALID_LENGTH),
        ({"length": FirmwareHeader.SIZE}, Status.INVALID_LENGTH),
    ):
        assert rejected(world.machine, Command.DOWNLOAD_FIRMWARE, **fields | change) == status


def test_no_firmware_while_snp_is_initialised(world):
    world.need(Command.SHUTDOWN)
    sev.sev_state(world.machine).snp_initialised = True
    assert rejected(world.machine, Command.DOWNLOAD_FIRMWARE) == Status.INVALID_PLATFORM_STATE


def test_with_a_running_guest_only_the_pdh_can_change(world):
    world.reach(GuestState.RUNNING)
    before = world.export()
    assert rejected(world.machine, Command.PEK_GEN) == Status.INVALID_PLATFORM_STATE
    world.need(Command.PDH_GEN)
    assert world.export()[0] != before[0]
