"""`sevlab measure`: the launch digest that a guest's owner expects, with the options of sev-snp-measure."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import NamedTuple

import click
from sevlab.core.cli import echo_json, write_output
from sevlab.core.errors import ConfigError
from sevlab.plugins.sev import SevLaunchDigest
from sevlab.plugins.sev_es import PROFILES
from sevlab.plugins.snp.commands.measure_diff import diff
from sevlab.plugins.snp.firmware import FOUR_GIB, Firmware, parse_firmware
from sevlab.plugins.snp.kernel_hashes import kernel_hash_table
from sevlab.plugins.snp.launch_digest import DIGEST_BYTES, LaunchDigest, PageType
from sevlab.plugins.snp.measure import (
    SNP_ACTIVE,
    add_image,
    boot_vmsas,
    measure_sev,
    measure_snp,
    measure_svsm,
    svsm_vmsas,
)
from sevlab.plugins.snp.vcpu_types import VCPU_TYPES, vcpu_signature

MODES = {"sev": "SEV", "seves": "SEV_ES", "snp": "SEV_SNP", "snp:ovmf-hash": "SEV_SNP", "snp:svsm": "SEV_SNP_SVSM"}
"""Modes with the names that sev-snp-measure prints."""

VMMS = {"QEMU" if name == "qemu" else name: name for name in PROFILES if name != "svsm"}
"""Values of --vmm-type: profiles of `sevlab.plugins.sev_es`."""

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def number(text: str) -> int:
    """A number in any notation: 18, 0x12."""
    try:
        return int(text, 0)
    except ValueError:
        raise click.BadParameter(f"{text!r}: expected a number such as 18 or 0x12") from None


def launch_digest(text: str) -> bytes:
    """48 bytes in hex."""
    try:
        data = bytes.fromhex(text)
    except ValueError:
        raise click.BadParameter(f"{text!r:.40}: expected hexadecimal digits") from None
    if len(data) != DIGEST_BYTES:
        raise click.BadParameter(f"{len(data)} bytes: expected {DIGEST_BYTES}, as {2 * DIGEST_BYTES} digits")
    return data


class Inputs(NamedTuple):
    """The options that a launch depends on."""

    mode: str
    ovmf: Firmware
    hash_table: bytes | None
    vcpus: int
    vcpu_signature: int
    profile: str
    guest_features: int
    firmware_digest: bytes | None
    svsm: Firmware | None


@click.group(invoke_without_command=True)
@click.option("--mode", type=click.Choice(list(MODES)), help="Kind of guest.  [required]")
@click.option("--ovmf", type=FILE, help="The firmware image.  [required]")
@click.option("--kernel", type=FILE, help="Kernel that QEMU loads and whose hash is measured.")
@click.option("--initrd", type=FILE, help="Initrd, with --kernel.")
@click.option("--append", metavar="CMDLINE", help="Kernel command line, with --kernel.")
@click.option("--vcpus", type=click.IntRange(1, 4096), help="Number of vCPUs; needed except in mode sev.")
@click.option("--vcpu-type", type=click.Choice(list(VCPU_TYPES)), metavar="CPUTYPE", help="QEMU's CPU model.")
@click.option("--vcpu-sig", type=number, metavar="VALUE", help="CPUID 1 EAX of the vCPU, in place of its type.")
@click.option("--vcpu-family", type=int, help="Family, with model and stepping, in place of the type.")
@click.option("--vcpu-model", type=int)
@click.option("--vcpu-stepping", type=int)
@click.option("--vmm-type", type=click.Choice(list(VMMS), case_sensitive=False), default="QEMU", show_default=True)
@click.option("--guest-features", type=number, metavar="VALUE", default="0x1", show_default=True, help="SEV_FEATURES.")
@click.option("--output-format", type=click.Choice(["hex", "base64"]), default="hex", show_default=True)
@click.option("--dump-vmsa", is_flag=True, help="Write the measured VMSAs to vmsa<N>.bin in this folder.")
@click.option(
    "--snp-ovmf-hash",
    type=launch_digest,
    metavar="HEX",
    help="What mode snp:ovmf-hash gave.",
)
@click.option("--svsm", type=FILE, help="The SVSM image, in mode snp:svsm.")
@click.option("--vars-size", type=number, metavar="VALUE", help="Bytes of the OVMF_VARS file, in mode snp:svsm.")
@click.option("--vars-file", type=FILE, help="The OVMF_VARS file itself, in place of its size.")
@click.option("--json", "as_json", is_flag=True, help="Every measured page, as JSON.")
@click.option("-v", "--verbose", is_flag=True, help="Say what was measured.")
@click.pass_context
def measure(
    ctx: click.Context,
    *,
    mode: str | None,
    ovmf: Path | None,
    kernel: Path | None,
    initrd: Path | None,
    append: str | None,
    vcpus: int | None,
    vcpu_type: str | None,
    vcpu_sig: int | None,
    vcpu_family: int | None,
    vcpu_model: int | None,
    vcpu_stepping: int | None,
    vmm_type: str,
    guest_features: int,
    output_format: str,
    dump_vmsa: bool,
    snp_ovmf_hash: bytes | None,
    svsm: Path | None,
    vars_size: int | None,
    vars_file: Path | None,
    as_json: bool,
    verbose: bool,
) -> None:
    """Compute the launch digest of an SEV, SEV-ES or SNP guest, or compare two of them page by page."""
    if ctx.invoked_subcommand is not None:
        return
    if mode is None or ovmf is None:
        raise click.UsageError("--mode and --ovmf are needed")
    image = parse_firmware(ovmf.read_bytes(), str(ovmf))
    if mode == "snp:ovmf-hash":
        digest = LaunchDigest()
        add_image(digest, image, "firmware")
        _show(mode, digest, output_format, as_json=as_json, verbose=verbose)
        return
    if kernel is None and (initrd is not None or append is not None):
        raise click.UsageError("--initrd and --append need --kernel")
    if mode != "sev" and vcpus is None:
        raise click.UsageError(f"mode {mode} needs --vcpus")
    if snp_ovmf_hash is not None and mode != "snp":
        raise click.UsageError("--snp-ovmf-hash is for mode snp")
    if dump_vmsa and mode == "sev":
        raise click.UsageError("--dump-vmsa: an SEV guest has no VMSA; use it in mode seves, snp or snp:svsm")
    if mode == "snp:svsm" and (kernel is not None or guest_features != SNP_ACTIVE):
        raise click.UsageError("mode snp:svsm measures no kernel and has guest features 0x1")
    inputs = Inputs(
        mode=mode,
        ovmf=image,
        hash_table=_hash_table(kernel, initrd, append) if kernel is not None else None,
        vcpus=vcpus or 0,
        vcpu_signature=_signature(mode, vmm_type, vcpu_type, vcpu_sig, (vcpu_family, vcpu_model, vcpu_stepping)),
        profile=VMMS[vmm_type],
        guest_features=guest_features,
        firmware_digest=snp_ovmf_hash,
        svsm=_svsm(svsm, vars_size, vars_file, image) if mode == "snp:svsm" else None,
    )
    if inputs.profile == "ec2":
        click.echo("note: published tools disagree about EC2's initial RDX, 0 or 0x600; measured is 0", err=True)
    vmsas = _vmsas(inputs)
    result = _measure(inputs, vmsas, log=as_json)
    if dump_vmsa:
        for number, page in enumerate(vmsas):
            write_output(Path(f"vmsa{number}.bin"), page)
    _show(mode, result, output_format, as_json=as_json, verbose=verbose)


measure.add_command(diff)


def _hash_table(kernel: Path, initrd: Path | None, append: str | None) -> bytes:
    def sha256(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    return kernel_hash_table(sha256(kernel), sha256(initrd) if initrd is not None else None, append)


def _signature(
    mode: str, vmm_type: str, name: str | None, signature: int | None, numbers: tuple[int | None, ...]
) -> int:
    if mode == "sev":
        return 0
    if any(number is not None for number in numbers):
        family, model, stepping = numbers
        if family is None or model is None or stepping is None:
            raise click.UsageError("--vcpu-family, --vcpu-model and --vcpu-stepping go together")
        return vcpu_signature(family, model, stepping)
    if signature is not None:
        return signature
    if name is not None:
        return VCPU_TYPES[name]
    if PROFILES[VMMS[vmm_type]].rdx is None:
        raise click.UsageError(f"mode {mode} needs --vcpu-type, --vcpu-sig or --vcpu-family")
    return 0


def _svsm(path: Path | None, vars_size: int | None, vars_file: Path | None, ovmf: Firmware) -> Firmware:
    if path is None or (vars_size is None) == (vars_file is None):
        raise click.UsageError("mode snp:svsm needs --svsm and one of --vars-size and --vars-file")
    size = vars_file.stat().st_size if vars_file is not None else vars_size or 0
    end_gpa = FOUR_GIB - len(ovmf.data) - size
    data = path.read_bytes()
    if size < 0 or len(data) > end_gpa:
        raise ConfigError(
            f"{path}: {len(data):#x} bytes do not fit below the firmware and {size:#x} bytes of variables"
        )
    return parse_firmware(data, str(path), end_gpa=end_gpa)


def _vmsas(inputs: Inputs) -> tuple[bytes, ...]:
    if inputs.mode == "sev":
        return ()
    if inputs.svsm is not None:
        return svsm_vmsas(inputs.svsm, inputs.vcpus, vcpu_signature=inputs.vcpu_signature)
    return boot_vmsas(
        inputs.profile,
        inputs.vcpus,
        ap_eip=inputs.ovmf.reset_eip,
        sev_features=0 if inputs.mode == "seves" else inputs.guest_features,
        vcpu_signature=inputs.vcpu_signature,
    )


def _measure(inputs: Inputs, vmsas: tuple[bytes, ...], *, log: bool) -> SevLaunchDigest | LaunchDigest:
    if inputs.svsm is not None:
        return measure_svsm(inputs.ovmf, inputs.svsm, vmsas=vmsas)
    if inputs.mode == "snp":
        return measure_snp(
            inputs.ovmf,
            vmsas=vmsas,
            hash_table=inputs.hash_table,
            profile=inputs.profile,
            firmware_digest=inputs.firmware_digest,
        )
    return measure_sev(inputs.ovmf, hash_table=inputs.hash_table, vmsas=vmsas, log=log)


def _show(
    mode: str, digest: SevLaunchDigest | LaunchDigest, output_format: str, *, as_json: bool, verbose: bool
) -> None:
    value = digest.value.hex() if output_format == "hex" else base64.b64encode(digest.value).decode()
    if as_json:
        echo_json({"mode": mode, "launch_digest": digest.value.hex(), "pages": _pages(digest)})
    elif verbose:
        click.echo(f"Calculated {MODES[mode]} guest measurement: {value}")
    else:
        click.echo(value)


def _pages(digest: SevLaunchDigest | LaunchDigest) -> list[dict[str, object]]:
    if isinstance(digest, SevLaunchDigest):
        return [
            {
                "part": item.part,
                "gpa": None if item.gpa is None else f"{item.gpa:#x}",
                "length_bytes": item.length_bytes,
                "contents": item.contents.hex(),
                "launch_digest": item.launch_digest.hex(),
            }
            for item in digest.parts
        ]
    return [
        {
            "part": page.part,
            "page_type": PageType(page.page_type).name,
            "gpa": f"{page.gpa:#x}",
            "contents": page.contents.hex(),
            "launch_digest": page.launch_digest.hex(),
        }
        for page in digest.pages
    ]
