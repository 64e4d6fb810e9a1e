"""The guest owner's side: measuring an image, verifying a report."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from importlib import resources

from sevlab.plugins.snp.firmware import parse_firmware
from sevlab.plugins.snp.launch_digest import LaunchDigest
from sevlab.plugins.snp.measure import add_image, measure_sev
from sevlab.plugins.snp.report import parse_report
from sevlab.plugins.snp.verify import verify_report
from sevlab.plugins.snp.x509 import parse_der

from tests.bench.harness import Bench, Row

IMAGE_BYTES = 4 << 20


def measuring(bench: Bench) -> list[Row]:
    data = hashlib.shake_256(b"image").digest(IMAGE_BYTES)
    image = parse_firmware(data, "image")
    number = 1 if bench.quick else 5

    def snp() -> None:
        add_image(LaunchDigest(), image, "firmware")

    measured, hashed = bench(snp, number), bench(lambda: hashlib.sha384(data).digest(), number)
    sev, sha256 = bench(lambda: measure_sev(image).value, number), bench(lambda: hashlib.sha256(data).digest(), number)
    return [
        ("SNP measure of a 4 MiB image, to SHA-384 of it", measured / hashed, f"{measured / 1000:.1f} ms"),
        ("SEV measure of a 4 MiB image, to SHA-256 of it", sev / sha256, f"{sev / 1000:.1f} ms"),
    ]


def verifying(bench: Bench) -> list[Row]:
    samples = resources.files("sevlab.plugins.snp") / "samples"
    at = datetime(2026, 1, 1, tzinfo=UTC)
    files = [(samples / f"milan-{role}.der").read_bytes() for role in ("vcek", "ask", "ark")]
    data = (samples / "milan-report.bin").read_bytes()

    def verify() -> None:
        assert all(check.passed for check in verify_report(parse_report(data), [parse_der(f) for f in files], at=at))

    return [("SNP report verified against its chain, certificates parsed", 0, f"{bench(verify, 20) / 1000:.2f} ms")]


GROUPS = (measuring, verifying)
