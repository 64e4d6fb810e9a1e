"""The guest of a campaign on disk: which one, and what is other than at its launch when it stands at its place.

It is launched again each time, which takes seconds, and not run again, which may take minutes. The file is no format
for exchange: the processor's state is that of one build of the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import msgpack
import zstandard
from sevlab.core.errors import CampaignError
from sevlab.plugins.engines.block_trace import BlockTrace
from sevlab.plugins.engines.start import Begun, Start, launch, ready, travel
from sevlab.plugins.engines.unicorn_engine import UnicornCpu
from sevlab.traces.machine_state import pack_snapshot, unpack_snapshot

FILE = "guest.state"
VERSION = 1


def save(start: Start, path: Path) -> None:
    """Boot the guest, run it to its place and keep it. Raises `ConfigError` when it does not get there."""
    run, symbols = launch(start)
    launched = run.machine.snapshot()
    travel(run, symbols, start)
    assert isinstance(run.engine, UnicornCpu)  # `boot` made it
    document = {
        "version": VERSION,
        "start": list(start),
        "changes": pack_snapshot(run.machine.snapshot(), launched),
        "processor": run.engine.snapshot(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zstandard.ZstdCompressor(level=1).compress(msgpack.packb(document)))


def load(path: Path) -> tuple[Start, Begun]:
    """The guest in a file, ready for inputs. Raises `CampaignError` for another file."""
    try:
        data = zstandard.ZstdDecompressor().decompress(path.read_bytes())
        document = cast("dict[str, Any]", msgpack.unpackb(data))
    except (OSError, zstandard.ZstdError, ValueError) as error:
        raise CampaignError(f"{path}: no guest: {error}") from error
    if document.get("version") != VERSION:
        raise CampaignError(f"{path}: a guest of version {document.get('version')}, expected {VERSION}")
    start = Start(*document["start"])
    run, symbols = launch(start)
    engine = run.engine
    assert isinstance(engine, UnicornCpu)  # `boot` made it
    if len(document["processor"]) != len(engine.snapshot()):
        raise CampaignError(f"{path}: a guest of another build of unicorn: start a new campaign")
    run.machine.restore(unpack_snapshot(document["changes"], run.machine.snapshot()))
    engine.restore(document["processor"])
    trace = BlockTrace(engine)
    ready(run, trace, symbols, strict=start.strict)
    return start, Begun(run, trace, symbols)
