"""`sevlab measure guest`: the launch digest of what `sevlab run` loads, from the files alone."""

from __future__ import annotations

from typing import Any

import click
from sevlab.core.cli import echo_json
from sevlab.core.cpu import Vcpu
from sevlab.core.errors import ConfigError
from sevlab.core.generations import GENERATIONS
from sevlab.plugins.engines.commands.options import choice, guest_options
from sevlab.plugins.engines.launch import Feature, generation
from sevlab.plugins.sev import SevLaunchDigest
from sevlab.plugins.sev_es import initial_vmsa, state_bytes


@click.command(name="guest")
@guest_options
@click.option("--json", "as_json", is_flag=True, help="Every measured page, as JSON for `sevlab measure diff`.")
def guest(*, as_json: bool, **options: Any) -> None:
    """Compute the launch digest of KERNEL as `sevlab run` launches it; nothing is run and no key is made."""
    chosen = choice(options)
    if not chosen.feature.encrypted:
        raise ConfigError("--feature plain: a plain guest is not measured")
    mask = 1 << GENERATIONS[generation(chosen.paging)].c_bit
    image = chosen.image(mask)
    digest = SevLaunchDigest(log=as_json)
    for gpa, data in sorted(image.loads.items()):
        digest.add("page", gpa, data)
    if chosen.feature is Feature.SEV_ES:
        vcpu = Vcpu()
        image.start(vcpu.regs, vcpu.system, mask)
        digest.add("VMSA of vCPU 0", None, state_bytes(vcpu, initial_vmsa()))
    if not as_json:
        click.echo(digest.value.hex())
        return
    pages = [
        {
            "part": part.part,
            "gpa": None if part.gpa is None else hex(part.gpa),
            "length_bytes": part.length_bytes,
            "contents": part.contents.hex(),
            "launch_digest": part.launch_digest.hex(),
        }
        for part in digest.parts
    ]
    echo_json({"mode": chosen.feature.value, "launch_digest": digest.value.hex(), "pages": pages})
