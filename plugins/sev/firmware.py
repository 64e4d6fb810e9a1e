"""Firmware images for DOWNLOAD_FIRMWARE: AMD's header, and a signature of the simulated vendor in AMD's place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sevlab.core.layout import Layout, raw_bytes, u8, u32
from sevlab.core.units import is_aligned
from sevlab.plugins.sev import transfers
from sevlab.plugins.sev.buffers import OneBlob
from sevlab.plugins.sev.chain import rsa_algorithm
from sevlab.plugins.sev.command import Request
from sevlab.plugins.sev.context import sev_state
from sevlab.plugins.sev.numbers import Status
from sevlab.plugins.sev.signatures import RSA_EXPONENT, rsa_pss_sign, rsa_pss_verifies
from sevlab.plugins.sev.vendor import key_bits, vendor_key

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

COOKIE = b"$PS1"
"""Source: AMD's published images; psptool. UNVERIFIED."""

ALIGNMENT_BYTES = 32
MAX_BYTES = {"naples": 64 << 10, "rome": 64 << 10}
MAX_BYTES_LATER = 128 << 10
"""Largest image. Source: the sheet of 55766, DOWNLOAD_FIRMWARE; for parts after Milan UNVERIFIED."""


class FirmwareHeader(Layout, size=0x100):
    """Head of a firmware image; `signed_bytes` follow it, then the signature."""

    cookie = raw_bytes(0x10, 4, source="AMD-ASPFW sev_fw_image.h")
    signed_bytes = u32(0x14, doc="bytes after the header that the signature covers", source="AMD-ASPFW sev_fw_image.h")
    signed_option = u32(0x30, source="AMD-ASPFW sev_fw_image.h")
    security_patch_level = u32(0x4C, source="AMD-ASPFW sev_fw_image.h")
    version_build = u8(0x60, source="AMD-ASPFW sev_fw_image.h, FWVersion; sev_mcmd.h")
    version_minor = u8(0x61, source="AMD-ASPFW sev_fw_image.h, FWVersion; sev_mcmd.h")
    version_major = u8(0x62, source="AMD-ASPFW sev_fw_image.h, FWVersion; sev_mcmd.h")
    image_bytes = u32(0x6C, doc="with header and signature", source="AMD-ASPFW sev_fw_image.h")


def make_image(
    generation: str, version: tuple[int, int, int], body: bytes = bytes(0x1000), *, patch_level: int = 0
) -> bytes:
    """An image of API major, minor and build that a simulated platform of `generation` accepts.

    `patch_level`: what the TCB version says of it from then on.
    """
    bits = key_bits(generation)
    major, minor, build = version
    header = FirmwareHeader.build(
        cookie=COOKIE,
        signed_bytes=len(body),
        signed_option=1,
        security_patch_level=patch_level,
        version_build=build,
        version_minor=minor,
        version_major=major,
        image_bytes=FirmwareHeader.SIZE + len(body) + bits // 8,
    )
    signature = rsa_pss_sign(vendor_key(generation, "ask"), header + body, rsa_algorithm(bits))
    return header + body + signature[::-1]


def _verifies(generation: str, image: bytes) -> bool:
    """Whether the vendor signed it: the simulated ASK stands for the key that AMD signs firmware with."""
    bits = key_bits(generation)
    header = FirmwareHeader.from_bytes(image[: FirmwareHeader.SIZE])
    covered = FirmwareHeader.SIZE + header.signed_bytes
    if header.cookie != COOKIE or header.image_bytes != len(image) or covered + bits // 8 != len(image):
        return False
    modulus = vendor_key(generation, "ask").modulus
    signature = image[covered:][::-1]
    return rsa_pss_verifies(modulus, RSA_EXPONENT, image[:covered], signature, rsa_algorithm(bits))


def download_firmware(machine: Machine, request: Request[OneBlob]) -> Status:
    """Take a new firmware: its version is what PLATFORM_STATUS tells from now on; INIT is needed afterwards.

    Both platforms must be uninitialised. Source: 55766, DOWNLOAD_FIRMWARE; AMD-ASPFW sev_uapp/src/sev_mcmd.c and
    sev_hal.c, sev_hal_cache_new_image (statuses).
    """
    sev, buffer = sev_state(machine), request.buffer
    if sev.snp_initialised:
        return Status.INVALID_PLATFORM_STATE
    header = read_image(machine, buffer.spa, buffer.length)
    if isinstance(header, Status):
        return header
    sev.api_major, sev.api_minor, sev.build = header.version_major, header.version_minor, header.version_build
    return Status.SUCCESS


def read_image(machine: Machine, address: int, length_bytes: int) -> FirmwareHeader | Status:
    """The head of a good image, or what is wrong with it. Source: AMD-ASPFW sev_hal.c, sev_hal_cache_new_image."""
    if not is_aligned(address, ALIGNMENT_BYTES) or not transfers.valid_range(machine, address, FirmwareHeader.SIZE):
        return Status.INVALID_ADDRESS
    generation = machine.config.generation
    if not FirmwareHeader.SIZE < length_bytes <= MAX_BYTES.get(generation, MAX_BYTES_LATER):
        return Status.INVALID_LENGTH
    image = transfers.read(machine, address, length_bytes)
    if image is None:
        return Status.INVALID_ADDRESS
    if not _verifies(generation, image):
        return Status.BAD_SIGNATURE
    return FirmwareHeader.from_bytes(image[: FirmwareHeader.SIZE])
