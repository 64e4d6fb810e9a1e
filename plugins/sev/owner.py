"""The guest owner's side of an SEV launch: open a session, expect a measurement, seal a secret.

Source: 55766, LAUNCH_START, LAUNCH_MEASURE, LAUNCH_SECRET; virtee/sevctl; edk2 OvmfPkg/AmdSev/SecretDxe.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import NamedTuple

from sevlab.core.determinism import Entropy
from sevlab.core.errors import ConfigError, FormatError
from sevlab.core.layout import Layout, raw_bytes, u32
from sevlab.plugins.sev.certificates import SevCertificate, Usage
from sevlab.plugins.sev.chain import make_certificate
from sevlab.plugins.sev.checks import Check
from sevlab.plugins.sev.crypto import (
    KEY_SEED_BYTES,
    Context,
    TransportKeys,
    ecdh,
    launch_measure,
    public_point,
    scalar_from_seed,
    seal_packet,
    wrap_session,
)
from sevlab.plugins.sev.layout import KEY_BYTES, NONCE_BYTES, Measurement
from sevlab.plugins.sev.session import agreement_key

TABLE_GUID = "1e74f542-71dd-4d66-963e-ef4287ff173b"
"""GUID at the head of a table of secrets. Source: edk2 OvmfPkg/AmdSev/SecretDxe; Linux drivers/virt/coco/efi_secret."""

EFI_SOURCE = "Linux drivers/virt/coco/efi_secret/efi_secret.c"


class SecretEntry(Layout, size=20):
    """Head of a table of secrets, and of each entry: the length counts the head."""

    guid = raw_bytes(0x00, 16, doc="mixed byte order", source=EFI_SOURCE)
    length = u32(0x10, unit="bytes", source=EFI_SOURCE)


class OwnerSession(NamedTuple):
    """What the owner sends with LAUNCH_START, and the keys that stay with the owner."""

    certificate: SevCertificate
    session: bytes
    keys: TransportKeys


def open_session(pdh: SevCertificate, policy: int, entropy: Entropy) -> OwnerSession:
    """A session with the platform whose PDH certificate is given, for a guest with this `policy` (32 bits).

    Whether the PDH is a platform's is for `verify_chain` to say. Raises `ConfigError` for a certificate that is no PDH.
    """
    point = agreement_key(pdh.to_bytes())
    if point is None:
        raise ConfigError("session: expected a PDH certificate with a key on P-384")
    scalar = scalar_from_seed(entropy.take("owner.dh", KEY_SEED_BYTES))
    keys = TransportKeys(entropy.take("owner.tek", KEY_BYTES), entropy.take("owner.tik", KEY_BYTES))
    shared = ecdh(scalar, point)
    assert shared is not None  # the point is on the curve
    nonce, wrap_iv = entropy.take("owner.nonce", NONCE_BYTES), entropy.take("owner.iv", KEY_BYTES)
    certificate = make_certificate(Usage.PDH, public_point(scalar), api=(pdh.api_major, pdh.api_minor))
    return OwnerSession(certificate, wrap_session(shared, nonce, wrap_iv, keys, policy), keys)


class Expectation(NamedTuple):
    """What the owner knows of a launch; the first three are what PLATFORM_STATUS says."""

    api_major: int
    api_minor: int
    build: int
    policy: int
    launch_digest: bytes


def check_measurement(tik: bytes, measurement: bytes, expected: Expectation) -> list[Check]:
    """Compare LAUNCH_MEASURE's 48 bytes with what was expected. Raises `FormatError` for another length."""
    if len(measurement) != Measurement.SIZE:
        found = f"{len(measurement)} bytes"
        raise FormatError("measurement", 0, "Measurement", expected=f"{Measurement.SIZE} bytes", found=found)
    got = Measurement.from_bytes(measurement)
    measure = launch_measure(
        tik,
        api=(expected.api_major, expected.api_minor),
        build=expected.build,
        policy=expected.policy,
        launch_digest=expected.launch_digest,
        mnonce=got.mnonce,
    )
    source = "55766, LAUNCH_MEASURE"
    return [Check("launch", "measure", measure.hex(), got.measure.hex(), measure == got.measure, source)]


def secret_table(secrets: Iterable[tuple[str, bytes]]) -> bytes:
    """A table of (GUID, secret) as firmware and kernel read it, padded with zeros to 16 bytes."""
    body = b"".join(_entry(guid, secret) for guid, secret in secrets)
    table = _entry(TABLE_GUID, body)
    return table.ljust(-(-len(table) // 16) * 16, b"\0")


def _entry(guid: str, data: bytes) -> bytes:
    return SecretEntry.build(guid=uuid.UUID(guid).bytes_le, length=SecretEntry.SIZE + len(data)) + data


def seal_secret(keys: TransportKeys, measurement: bytes, secret: bytes, entropy: Entropy) -> tuple[bytes, bytes]:
    """(packet header, ciphertext) of LAUNCH_SECRET, bound to the guest's `measurement` (48 bytes).

    Raises `ConfigError` for a secret whose length the firmware refuses.
    """
    if not secret or len(secret) % 16:
        raise ConfigError(f"secret: {len(secret)} bytes, expected a positive multiple of 16")
    measure = Measurement.from_bytes(measurement).measure
    return seal_packet(
        keys, Context.LAUNCH_SECRET, secret, iv=entropy.take("owner.secret-iv", KEY_BYTES), measure=measure
    )
