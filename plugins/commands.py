"""The commands that the built-in features bring, as data: no feature is imported to list them."""

from __future__ import annotations

from sevlab.core.cliapi import CommandSpec
from sevlab.core.hookspecs import hookimpl

COMMANDS: tuple[CommandSpec, ...] = (
    CommandSpec("ghcb", "Decode a GHCB page", "sevlab.plugins.sev_es.commands.show:ghcb", "show"),
    CommandSpec("ghcb-msr", "Decode a value of the GHCB MSR", "sevlab.plugins.sev_es.commands.show:ghcb_msr", "show"),
    CommandSpec("vmsa", "Decode a VMSA page", "sevlab.plugins.sev_es.commands.show:vmsa", "show"),
    CommandSpec("exitinfo", "Decode EXITINFO1 of an exit", "sevlab.plugins.sev_es.commands.show:exitinfo", "show"),
    CommandSpec(
        "run",
        "Execute a kernel or program as a plain, SEV or SEV-ES guest",
        "sevlab.plugins.engines.commands.run:run",
    ),
    CommandSpec(
        "measure",
        "Compute the launch digest of an SEV, SEV-ES or SNP guest; compare two of them",
        "sevlab.plugins.snp.commands.measure:measure",
    ),
    CommandSpec(
        "guest",
        "Compute the launch digest of a kernel that `sevlab run` loads",
        "sevlab.plugins.engines.commands.measure:guest",
        "measure",
    ),
    CommandSpec(
        "session",
        "Open an SEV session with a platform, from its PDH and chain",
        "sevlab.plugins.sev.commands.attest:session",
        "attest",
    ),
    CommandSpec(
        "verify-measurement",
        "Verify what LAUNCH_MEASURE gave for an SEV guest",
        "sevlab.plugins.sev.commands.attest:verify_measurement",
        "attest",
    ),
    CommandSpec("secret", "Seal a launch secret", "sevlab.plugins.sev.commands.attest:secret", "attest"),
    CommandSpec(
        "verify-chain",
        "Verify an SEV platform's chain of certificates",
        "sevlab.plugins.sev.commands.attest:verify_chain_",
        "attest",
    ),
    CommandSpec(
        "verify",
        "Verify an SNP attestation report against the chain behind its key",
        "sevlab.plugins.snp.commands.verify:verify",
        "attest",
    ),
    CommandSpec(
        "command", "Decode a command buffer of the SEV mailbox", "sevlab.plugins.snp.commands.command:command", "show"
    ),
    CommandSpec("report", "Decode an attestation report", "sevlab.plugins.snp.commands.show:report", "show"),
    CommandSpec("certtable", "Decode a certificate table", "sevlab.plugins.snp.commands.show:certtable", "show"),
    CommandSpec("cert", "Decode certificates: SEV, AMD, X.509", "sevlab.plugins.snp.commands.show:cert", "show"),
    CommandSpec("secrets", "Decode an SNP secrets page", "sevlab.plugins.snp.commands.pages:secrets", "show"),
    CommandSpec("cpuid-page", "Decode an SNP CPUID page", "sevlab.plugins.snp.commands.pages:cpuid_page", "show"),
    CommandSpec("rmp", "Decode entries of a reverse map table", "sevlab.plugins.snp.commands.pages:rmp", "show"),
    CommandSpec("chain", "Say who signed whom among certificates", "sevlab.plugins.snp.commands.show:chain", "show"),
)


@hookimpl
def sevlab_commands() -> tuple[CommandSpec, ...]:
    return COMMANDS
