"""Structures that cross between the guest owner, the firmware and another platform."""

from __future__ import annotations

from sevlab.core.layout import Layout, bits, flag, raw_bytes, u32, u64

NONCE_BYTES = 16
KEY_BYTES = 16
MAC_BYTES = 32
FIELD_BYTES = 48
"""Bytes of a coordinate, and of the ECDH result, of P-384."""
NUMBER_BYTES = 72
"""Bytes of a coordinate or signature half in a certificate: little-endian, zero padded."""
MEASUREMENT_BYTES = MAC_BYTES + NONCE_BYTES
CERTIFICATE_BYTES = 0x824
CHAIN_BYTES = 3 * CERTIFICATE_BYTES


class Session(Layout, size=0x80):
    """The owner's session buffer of LAUNCH_START and RECEIVE_START: transport keys wrapped for the platform."""

    nonce = raw_bytes(0x00, NONCE_BYTES, source="55766, LAUNCH_START; sev-tool sevapi.h sev_session_buf")
    wrap_tk = raw_bytes(0x10, 32, doc="TEK and TIK under the KEK", source="55766, LAUNCH_START")
    wrap_iv = raw_bytes(0x30, 16, doc="first counter block, big-endian", source="55766, LAUNCH_START")
    wrap_mac = raw_bytes(0x40, MAC_BYTES, doc="of wrap_tk alone, under the KIK", source="55766, LAUNCH_START")
    policy_mac = raw_bytes(0x60, MAC_BYTES, doc="of the policy, under the TIK", source="55766, LAUNCH_START")


class PacketHeader(Layout, size=0x34):
    """Header of a packet in transport: a launch secret, guest data, or a VMSA."""

    compressed = flag(0x00, u32, 0, source="55766, LAUNCH_SECRET")
    iv = raw_bytes(0x04, 16, doc="first counter block, big-endian", source="55766, LAUNCH_SECRET")
    mac = raw_bytes(0x14, MAC_BYTES, source="55766, LAUNCH_SECRET")


class Measurement(Layout, size=MEASUREMENT_BYTES):
    """What LAUNCH_MEASURE writes."""

    measure = raw_bytes(0x00, MAC_BYTES, doc="HMAC-SHA256 under the TIK", source="55766, LAUNCH_MEASURE")
    mnonce = raw_bytes(0x20, NONCE_BYTES, source="55766, LAUNCH_MEASURE")


class SwapMetadata(Layout, size=0x40):
    """What SWAP_OUT writes beside the page; with the tag zero it is the associated data of the encryption."""

    software_data = u64(0x00, doc="the hypervisor's", source="sev_mcmd.h, sev_mcmd_swap_io_mdata_t")
    iv = u64(0x08, doc="counter of the guest's offline key", source="sev_mcmd.h, sev_mcmd_swap_io_mdata_t")
    tag = raw_bytes(0x10, 16, source="sev_mcmd.h, sev_mcmd_swap_io_mdata_t")
    large = flag(0x3C, u32, 0, source="sev_mcmd.h, sev_mcmd_swap_io_mdata_t")
    page_type = bits(0x3C, u32, 2, 1, source="sev_mcmd.h, sev_mcmd_swap_io_mdata_t")


class AttestationReport(Layout, size=0xD0):
    """What ATTESTATION writes: signed by the PEK over the bytes before `signature_usage`."""

    mnonce = raw_bytes(0x00, NONCE_BYTES, source="Linux include/uapi/linux/psp-sev.h; 55766, ATTESTATION")
    launch_digest = raw_bytes(0x10, 32, source="55766, ATTESTATION")
    policy = u32(0x30, source="55766, ATTESTATION")
    signature_usage = u32(0x34, source="55766, ATTESTATION")
    signature_algorithm = u32(0x38, source="55766, ATTESTATION")
    signature_r = raw_bytes(0x40, NUMBER_BYTES, source="55766, ATTESTATION")
    signature_s = raw_bytes(0x88, NUMBER_BYTES, source="55766, ATTESTATION")


REPORT_SIGNED_BYTES = 0x34
