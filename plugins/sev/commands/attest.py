"""`sevlab attest session|verify-measurement|secret|verify-chain`: the owner of an SEV guest."""

from __future__ import annotations

import base64
import binascii
import os
import uuid
from pathlib import Path

import click
from sevlab.core.cli import echo_json, write_output
from sevlab.core.determinism import Entropy
from sevlab.core.errors import ConfigError, FormatError
from sevlab.plugins.sev.certificates import (
    AmdCertificate,
    Certificate,
    SevCertificate,
    Usage,
    parse_certificates,
    usage_of,
)
from sevlab.plugins.sev.chain import verify_chain
from sevlab.plugins.sev.checks import show_checks
from sevlab.plugins.sev.crypto import TransportKeys
from sevlab.plugins.sev.layout import KEY_BYTES, MEASUREMENT_BYTES
from sevlab.plugins.sev.owner import Expectation, check_measurement, open_session, seal_secret, secret_table

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
DIGEST_BYTES = 32


def number(text: str) -> int:
    """A number of up to 32 bits in any notation."""
    try:
        value = int(text, 0)
    except ValueError:
        raise click.BadParameter(f"{text!r}: expected a number such as 1 or 0x10") from None
    if not 0 <= value < 1 << 32:
        raise click.BadParameter(f"{text!r}: expected 0 to 0xffffffff")
    return value


def byte(text: str) -> int:
    """A number of up to 8 bits in any notation."""
    value = number(text)
    if value > 0xFF:
        raise click.BadParameter(f"{text!r}: expected 0 to 255")
    return value


def launch_digest(text: str) -> bytes:
    """32 bytes in hex."""
    try:
        data = bytes.fromhex(text)
    except ValueError:
        raise click.BadParameter(f"{text!r:.40}: expected hexadecimal digits") from None
    if len(data) != DIGEST_BYTES:
        raise click.BadParameter(f"{len(data)} bytes: expected {DIGEST_BYTES}, as {2 * DIGEST_BYTES} digits")
    return data


def measurement_blob(text: str) -> bytes:
    """48 bytes in base64, as a VMM hands them out."""
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise click.BadParameter(f"{text!r:.40}: expected base64: {error}") from None
    if len(data) != MEASUREMENT_BYTES:
        raise click.BadParameter(f"{len(data)} bytes: expected {MEASUREMENT_BYTES}, measure and nonce")
    return data


def guid_and_file(text: str) -> tuple[str, Path]:
    """GUID:FILE in its parts."""
    guid, _, path = text.partition(":")
    try:
        name = str(uuid.UUID(guid))
    except ValueError:
        raise click.BadParameter(f"{text!r:.60}: expected GUID:FILE") from None
    if not Path(path).is_file():
        raise click.BadParameter(f"{path!r}: no such file")
    return name, Path(path)


def read_key(path: Path, name: str) -> bytes:
    """A key file of 16 bytes. Raises `FormatError`."""
    data = path.read_bytes()
    if len(data) != KEY_BYTES:
        offset = min(len(data), KEY_BYTES)
        raise FormatError(str(path), offset, name, expected=f"{KEY_BYTES} bytes", found=f"{len(data)} bytes")
    return data


def read_chain(files: tuple[Path, ...]) -> list[Certificate]:
    """All certificates of the files. Raises `FormatError`."""
    return [item for path in files for _, item in parse_certificates(path.read_bytes(), str(path))]


def read_ark(path: Path | None) -> AmdCertificate | None:
    """The root to trust in place of AMD's. Raises `FormatError`, `ConfigError` for a certificate that is no ARK."""
    if path is None:
        return None
    found = [item for _, item in parse_certificates(path.read_bytes(), str(path)) if usage_of(item) is Usage.ARK]
    if len(found) != 1 or not isinstance(found[0], AmdCertificate):
        raise ConfigError(f"{path}: {len(found)} ARK certificates, expected one")
    return found[0]


def entropy_of(seed: str | None) -> Entropy:
    """The source of keys and nonces: the operating system's randomness, or a seed for a run that can be repeated."""
    entropy = Entropy()
    entropy.seed = os.urandom(32) if seed is None else seed.encode()
    return entropy


SEED = click.option("--seed", help="Make the same keys each time; for simulations only.")
JSON = click.option("--json", "as_json", is_flag=True, help="As JSON.")
ARK = click.option("--ark", type=FILE, help="A root to trust in place of AMD's, for a simulated platform.")


@click.command("verify-chain")
@click.argument("files", type=FILE, nargs=-1, required=True)
@ARK
@JSON
def verify_chain_(*, files: tuple[Path, ...], ark: Path | None, as_json: bool) -> None:
    """Verify a platform's chain ARK, ASK, CEK, OCA, PEK, PDH from the certificates in FILES, in any order.

    A platform exports its CEK without AMD's signature; take the CEK that AMD's key server gives for the chip's id.
    """
    show_checks(verify_chain(read_chain(files), trusted_ark=read_ark(ark)), as_json=as_json)


@click.command()
@click.argument("files", type=FILE, nargs=-1, required=True)
@click.option("--policy", type=number, metavar="VALUE", required=True, help="The guest policy, such as 0x1.")
@click.option("--name", default="launch", show_default=True, help="How the written files begin.")
@click.option("--unverified", is_flag=True, help="Trust the PDH without its chain.")
@ARK
@SEED
@JSON
@click.pass_context
def session(
    ctx: click.Context,
    *,
    files: tuple[Path, ...],
    policy: int,
    name: str,
    unverified: bool,
    ark: Path | None,
    seed: str | None,
    as_json: bool,
) -> None:
    """Open a session with the platform whose PDH and chain are in FILES.

    Writes NAME_godh.b64 and NAME_session.b64 for the VMM, and NAME_tek.bin and NAME_tik.bin, which stay with the owner.
    """
    chain = read_chain(files)
    if not unverified:
        failed = [check for check in verify_chain(chain, trusted_ark=read_ark(ark)) if not check.passed]
        if failed:
            show_checks(failed, as_json=as_json)
    pdhs = [item for item in chain if isinstance(item, SevCertificate) and usage_of(item) is Usage.PDH]
    if len(pdhs) != 1:
        raise ConfigError(f"{', '.join(map(str, files))}: {len(pdhs)} PDH certificates, expected one")
    opened = open_session(pdhs[0], policy, entropy_of(seed))
    written = {
        f"{name}_godh.b64": base64.b64encode(opened.certificate.to_bytes()),
        f"{name}_session.b64": base64.b64encode(opened.session),
        f"{name}_tek.bin": opened.keys.tek,
        f"{name}_tik.bin": opened.keys.tik,
    }
    for path, data in written.items():
        write_output(Path(path), data, mode=0o600 if path.endswith(".bin") else 0o644)
    if as_json:
        echo_json({"policy": policy, "files": list(written)})
    else:
        click.echo("\n".join(written))


@click.command("verify-measurement")
@click.option("--tik", type=FILE, required=True, help="The session's integrity key, 16 bytes.")
@click.option("--measurement", type=measurement_blob, metavar="BASE64", required=True, help="What LAUNCH_MEASURE gave.")
@click.option("--launch-digest", type=launch_digest, metavar="HEX", required=True, help="What `sevlab measure` gives.")
@click.option("--api-major", type=byte, metavar="N", required=True)
@click.option("--api-minor", type=byte, metavar="N", required=True)
@click.option("--build-id", type=byte, metavar="N", required=True)
@click.option("--policy", type=number, metavar="VALUE", required=True, help="The guest policy.")
@JSON
def verify_measurement(
    *,
    tik: Path,
    measurement: bytes,
    launch_digest: bytes,
    api_major: int,
    api_minor: int,
    build_id: int,
    policy: int,
    as_json: bool,
) -> None:
    """Verify that a guest's measurement is the expected one: exit code 0 if it is, 1 if not."""
    expected = Expectation(api_major, api_minor, build_id, policy, launch_digest)
    show_checks(check_measurement(read_key(tik, "TIK"), measurement, expected), as_json=as_json)


@click.command()
@click.argument("header", type=click.Path(dir_okay=False, path_type=Path))
@click.argument("payload", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--tik", type=FILE, required=True, help="The session's integrity key, 16 bytes.")
@click.option("--tek", type=FILE, required=True, help="The session's encryption key, 16 bytes.")
@click.option("--measurement", type=measurement_blob, metavar="BASE64", required=True, help="What LAUNCH_MEASURE gave.")
@click.option("--secret", "secrets", type=guid_and_file, metavar="GUID:FILE", multiple=True, help="An entry; repeat.")
@click.option("--raw", type=FILE, help="The bytes to send as they are, in place of a table of secrets.")
@SEED
@JSON
def secret(
    *,
    header: Path,
    payload: Path,
    tik: Path,
    tek: Path,
    measurement: bytes,
    secrets: tuple[tuple[str, Path], ...],
    raw: Path | None,
    seed: str | None,
    as_json: bool,
) -> None:
    """Seal a launch secret for the guest with that measurement; writes HEADER and PAYLOAD for the VMM.

    Verify the measurement first: whoever holds it gets the secret.
    """
    if (raw is None) == (not secrets):
        raise click.UsageError("give --secret at least once, or --raw")
    keys = TransportKeys(read_key(tek, "TEK"), read_key(tik, "TIK"))
    plain = raw.read_bytes() if raw is not None else secret_table((guid, path.read_bytes()) for guid, path in secrets)
    packet, ciphertext = seal_secret(keys, measurement, plain, entropy_of(seed))
    write_output(header, packet)
    write_output(payload, ciphertext)
    if as_json:
        echo_json({"header": str(header), "payload": str(payload), "secret_bytes": len(plain)})
    else:
        click.echo(f"{header} ({len(packet)} bytes), {payload} ({len(ciphertext)} bytes)")
