"""The options that say which guest is loaded: those of `sevlab run` and of `sevlab measure guest`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import click
from sevlab.core.config import parse_size
from sevlab.core.errors import ConfigError
from sevlab.plugins.engines.launch import Feature, Paging
from sevlab.plugins.engines.loaders.image import GuestImage
from sevlab.plugins.engines.loaders.load import load_guest

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
C = TypeVar("C", bound=Callable[..., Any])

OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.argument("kernel", type=FILE),
    click.option("--initrd", type=FILE, help="Initial RAM disk of a Linux kernel."),
    click.option("--append", default="", metavar="CMDLINE", help="Kernel command line."),
    click.option(
        "--feature", type=click.Choice([feature.value for feature in Feature]), default="plain", show_default=True
    ),
    click.option("--memory", default="256 MiB", show_default=True, help="Memory of the guest."),
    click.option("--direct", is_flag=True, help="Take the kernel out of its bzImage and skip its decompressor."),
    click.option(
        "--engine-paging",
        type=click.Choice([paging.value for paging in Paging]),
        default="own",
        show_default=True,
        help="Who walks the guest's page tables; nested is faster and puts the C-bit at 39.",
    ),
)


def guest_options(command: C) -> C:
    """Give a command these options; it takes them as `**options` for `GuestChoice`."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


class GuestChoice(NamedTuple):
    """What the options say."""

    kernel: Path
    initrd: Path | None
    append: str
    feature: Feature
    memory_bytes: int
    direct: bool
    paging: Paging

    def image(self, c_bit_mask: int, *, reserved_bytes: int = 0) -> GuestImage:
        """The guest, loaded below the last `reserved_bytes` of memory. Raises `ConfigError` or `FormatError`."""
        return load_guest(
            self.kernel,
            memory_bytes=self.memory_bytes - reserved_bytes,
            initrd=self.initrd,
            append=self.append,
            encrypted=self.feature.encrypted,
            c_bit_mask=c_bit_mask,
            direct=self.direct,
        )


def choice(options: dict[str, Any]) -> GuestChoice:
    """The options as a value. Raises `ConfigError` for a size that no guest has."""
    memory_bytes = parse_size(options["memory"], "--memory")
    if memory_bytes < 1 << 20 or memory_bytes % (2 << 20):
        raise ConfigError(f"--memory {options['memory']}: expected a multiple of 2 MiB")
    return GuestChoice(
        options["kernel"],
        options["initrd"],
        options["append"],
        Feature(options["feature"]),
        memory_bytes,
        options["direct"],
        Paging(options["engine_paging"]),
    )
