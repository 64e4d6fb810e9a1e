"""Build hook of the editable install."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class EditableLinks(BuildHookInterface):  # type: ignore[type-arg]  # hatchling is untyped here
    """Editable install: link the folders so that they import as ``sevlab.<folder>``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            return
        for folder, target in self.build_config.target_config["sources"].items():
            link = Path(self.root, ".editable", target)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(Path(self.root, folder), target_is_directory=True)
