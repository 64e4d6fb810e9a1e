"""The targets there are: the kernel's own, and those that plugins bring."""

from __future__ import annotations

from sevlab.core.errors import CampaignError
from sevlab.core.events import KERNEL_RECORDS, Party
from sevlab.core.oracle import Target
from sevlab.core.plugins import PluginSet, load_all
from sevlab.core.vocabulary import spec_of

KERNEL = Target(
    "kernel",
    Party.HYPERVISOR,
    tuple(sorted(spec_of(record).kind for record in KERNEL_RECORDS if spec_of(record).is_step)),
    (),
    ("sme",),
    "The kernel alone: every step of its own with any values, from everybody.",
)


def all_targets(plugins: PluginSet | None = None) -> dict[str, Target]:
    """Every target by name, of `plugins` or of all that are installed. Raises `CampaignError` for a name with two."""
    targets = {KERNEL.name: KERNEL}
    for plugin, found in (plugins or load_all()).call("sevlab_targets").items():
        for target in found:
            if target.name in targets:
                raise CampaignError(f"plugin {plugin!r} brings a target {target.name!r}, which is there already")
            targets[target.name] = target
    return targets


def target_named(name: str, plugins: PluginSet | None = None) -> Target:
    """One target. Raises `CampaignError` that lists those there are."""
    targets = all_targets(plugins)
    if name not in targets:
        raise CampaignError(f"there is no target {name!r}; there are {', '.join(sorted(targets))}")
    return targets[name]
