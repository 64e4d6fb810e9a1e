"""The firmware's side of attestation: which key signs, what a report says, what a derived key is made of.

Source: 56860, MSG_REPORT_REQ and MSG_KEY_REQ; AMD-ASPFW sev_uapp/src/sev_channel.c.
"""

from __future__ import annotations

from enum import IntFlag
from typing import TYPE_CHECKING

from sevlab.core.layout import Layout, bits, flag, raw_bytes, u32, u64
from sevlab.plugins.sev import crypto, identity, sev_state
from sevlab.plugins.snp import keys
from sevlab.plugins.snp.chain import sign_report
from sevlab.plugins.snp.context import SnpGuest, SnpPlatform
from sevlab.plugins.snp.id_block import IdBlock
from sevlab.plugins.snp.report import TURIN_CHIP_ID_BYTES, AttestationReport, KeyInfo, PlatformInfo, SigningKey

if TYPE_CHECKING:
    from sevlab.core.machine import Machine

NO_VLEK, VCEK, VLEK, KEY_SEL_RESERVED = 0, 1, 2, 3
"""Values of KEY_SEL. Source: 56860, MSG_REPORT_REQ."""

LABEL_DERIVED = b"gmsg-keyreq"
DERIVED_BYTES = 32


class GuestField(IntFlag):
    """What GUEST_FIELD_SELECT mixes into a derived key. Source: 56860, MSG_KEY_REQ."""

    POLICY = 1 << 0
    IMAGE_ID = 1 << 1
    FAMILY_ID = 1 << 2
    MEASUREMENT = 1 << 3
    GUEST_SVN = 1 << 4
    TCB_VERSION = 1 << 5
    LAUNCH_MIT_VECTOR = 1 << 6
    """Since version 2 of the request."""


KNOWN_FIELDS = {1: 0x3F, 2: 0x7F}
"""By version of the request."""
MITIGATIONS_SINCE = 5
"""Version of the reports that have mitigation vectors."""


class DerivedKeyContext(Layout, size=0xA8):
    """The KDF context of a derived key, as firmware 1.55 has it."""

    root_key_select = flag(0x00, u32, 0, source="AMD-ASPFW sev_uapp/src/sev_channel.c")
    id_key_kind = bits(0x00, u32, 2, 1, doc="0 none, 1 ID key, 2 author key", source="AMD-ASPFW")
    guest_field_select = u64(0x08, source="AMD-ASPFW")
    vmpl = u32(0x10, source="AMD-ASPFW")
    guest_svn = u32(0x14, source="AMD-ASPFW")
    tcb_version = u64(0x18, source="AMD-ASPFW")
    policy = u64(0x20, source="AMD-ASPFW")
    image_id = raw_bytes(0x28, 16, source="AMD-ASPFW")
    family_id = raw_bytes(0x38, 16, source="AMD-ASPFW")
    measurement = raw_bytes(0x48, 32, doc="the first 32 bytes", source="AMD-ASPFW")
    host_data = raw_bytes(0x68, 32, source="AMD-ASPFW")
    id_key_digest = raw_bytes(0x88, 32, doc="the first 32 bytes, of the author key's where there is one", source="FW")


def selected_key(platform: SnpPlatform, guest: SnpGuest, key_sel: int) -> SigningKey | None:
    """The key that KEY_SEL means; None: INVALID_KEY. Source: AMD-ASPFW sev_uapp/src/sev_channel.c."""
    vlek = key_sel == VLEK or (key_sel == NO_VLEK and platform.vlek)
    if key_sel == KEY_SEL_RESERVED or (vlek and not platform.vlek) or (not vlek and guest.vcek_dis):
        return None
    return SigningKey.VLEK if vlek else SigningKey.VCEK


def id_block_of(guest: SnpGuest) -> IdBlock:
    """The guest's ID block; all zero without one."""
    return IdBlock.from_bytes(guest.id_block or bytes(IdBlock.SIZE))


def chip_id_of(machine: Machine) -> bytes:
    """The 64 bytes of CHIP_ID: on Turin only the first 8 are used."""
    whole = identity.chip_id(sev_state(machine).chip_key)
    if machine.config.part.name == "turin":
        return whole[:TURIN_CHIP_ID_BYTES].ljust(len(whole), b"\0")
    return whole


def family_model_stepping(machine: Machine) -> tuple[int, int, int]:
    """Combined family, combined model and stepping of the part. Source: 24594, CPUID Fn0000_0001_EAX."""
    return {"milan": (0x19, 0x01, 1), "genoa": (0x19, 0x11, 1), "turin": (0x1A, 0x02, 1)}.get(
        machine.config.part.name, (0, 0, 0)
    )


def make_report(machine: Machine, guest: SnpGuest, *, report_data: bytes, vmpl: int, signing_key: SigningKey) -> bytes:
    """The signed attestation report of a guest.

    A VCEK that is masked signs nothing: the signature is zero and SIGNING_KEY says so. Source: 56860,
    ATTESTATION_REPORT; AMD-ASPFW sev_uapp/src/sev_channel.c.
    """
    from sevlab.plugins.snp.states import snp_state

    platform, sev, block = snp_state(machine).platform, sev_state(machine), id_block_of(guest)
    masked = platform.mask_chip_key and signing_key is SigningKey.VCEK
    version = platform.report_version
    fields: dict[str, int | bytes] = {}
    if version > 2:
        family, model, stepping = family_model_stepping(machine)
        fields |= {"cpuid_family": family, "cpuid_model": model, "cpuid_stepping": stepping}
    if version >= MITIGATIONS_SINCE:
        fields |= {"launch_mit_vector": guest.launch_mit_vector, "current_mit_vector": platform.mitigations_verified}
    committed = platform.committed_version
    body = AttestationReport.build(
        report_version=version,
        guest_svn=block.guest_svn,
        policy=guest.policy,
        family_id=block.family_id,
        image_id=block.image_id,
        vmpl=vmpl,
        signature_algo=1,
        current_tcb=platform.current_tcb,
        platform_info=_word(
            PlatformInfo.build(
                smt_en=int(platform.smt),
                rapl_dis=int(platform.rapl_dis),
                ciphertext_hiding_dram_en=int(platform.ciphertext_hiding),
            )
        ),
        key_info=_word(
            KeyInfo.build(
                author_key_en=int(guest.author_key_en),
                mask_chip_key=int(platform.mask_chip_key),
                signing_key=SigningKey.NONE if masked else signing_key,
            )
        ),
        report_data=report_data,
        measurement=guest.launch_digest,
        host_data=guest.host_data,
        id_key_digest=guest.id_key_digest,
        author_key_digest=guest.author_key_digest,
        report_id=guest.report_id,
        report_id_ma=guest.report_id_ma,
        reported_tcb=platform.reported_tcb,
        chip_id=bytes(64) if platform.mask_chip_id else chip_id_of(machine),
        committed_tcb=platform.committed_tcb,
        current_build=sev.build,
        current_minor=sev.api_minor,
        current_major=sev.api_major,
        committed_build=committed[2],
        committed_minor=committed[1],
        committed_major=committed[0],
        launch_tcb=guest.launch_tcb,
        **fields,
    )
    if masked:
        return body
    stick = platform.vlek if signing_key is SigningKey.VLEK else keys.vcek_stick(machine, platform.reported_tcb)
    return sign_report(keys.signing_scalar(stick), body)


def _word(data: bytes) -> int:
    return int.from_bytes(data, "little")


def derive_key(
    machine: Machine,
    guest: SnpGuest,
    *,
    root: bytes,
    vmrk: bool,
    fields: int,
    vmpl: int,
    guest_svn: int,
    tcb_version: int,
    launch_mit_vector: int = 0,
) -> bytes:
    """The 32 bytes of MSG_KEY_RSP. What is not selected is zero; VMPL, host data and key digest are always mixed in.

    `root`: the VCEK's or VLEK's stick, or the VMRK. That a mitigation vector follows the rest is the model's own, as
    how firmware mixes it in is not public: UNVERIFIED. Source: AMD-ASPFW sev_uapp/src/sev_channel.c.
    """
    block = id_block_of(guest)
    kind = (2 if guest.author_key_en else 1) if guest.id_block else 0
    digest = {0: bytes(48), 1: guest.id_key_digest, 2: guest.author_key_digest}[kind]
    chosen: dict[str, int | bytes] = {
        "policy": guest.policy if fields & GuestField.POLICY else 0,
        "image_id": block.image_id if fields & GuestField.IMAGE_ID else bytes(16),
        "family_id": block.family_id if fields & GuestField.FAMILY_ID else bytes(16),
        "measurement": guest.launch_digest[:32] if fields & GuestField.MEASUREMENT else bytes(32),
        "guest_svn": guest_svn if fields & GuestField.GUEST_SVN else 0,
        "tcb_version": tcb_version if fields & GuestField.TCB_VERSION else 0,
    }
    context = DerivedKeyContext.build(
        root_key_select=int(vmrk),
        id_key_kind=kind,
        guest_field_select=fields,
        vmpl=vmpl,
        host_data=guest.host_data,
        id_key_digest=digest[:32],
        **chosen,
    )
    if fields & GuestField.LAUNCH_MIT_VECTOR:
        context += launch_mit_vector.to_bytes(8, "little")
    return crypto.kdf(root, LABEL_DERIVED, context, DERIVED_BYTES)
