"""Helpers for tests of plugins; public, and used by the built-in plugins' own tests.

```python
from sevlab.core.testing import assert_changes_nothing, make_machine
```
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sevlab.core.config import GuestConfig, MachineConfig, Scalar
from sevlab.core.layout import Layout
from sevlab.core.machine import Machine
from sevlab.core.vocabulary import Outcome, Record, RecordSpec, Vocabulary, spec_of

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

INTERESTING_NUMBERS = (0, 1, 2, 3, 0xFF, 0xFFF, 0x1000, 0x7FFF_FFFF, 1 << 31, 1 << 32, 1 << 47, 1 << 51, (1 << 64) - 1)
"""Numbers at which something changes in many fields."""


def make_machine(
    *plugins: str,
    given: Mapping[str, Any] | None = None,
    guests: int | tuple[GuestConfig, ...] = 0,
    options: Mapping[str, Mapping[str, Scalar]] | None = None,
    **settings: Any,
) -> Machine:
    """A machine with `plugins` and, as a number or in full, `guests`; other settings as in `MachineConfig`.

    `given` are plugin modules that take part without being installed.
    """
    wanted = tuple(GuestConfig(name=f"guest{n}") for n in range(guests)) if isinstance(guests, int) else guests
    config = MachineConfig(plugins=plugins, guests=wanted, options=options or {}, **settings)
    return Machine(config, given=given)


def assert_changes_nothing(machine: Machine, step: Record) -> Outcome:
    """Apply `step` and assert that the whole machine is as before; returns the outcome."""
    before = machine.snapshot()
    outcome = machine.apply(step)
    after = machine.snapshot()
    assert after.state == before.state, f"{step} changed the state"
    assert after.memory == before.memory, f"{step} changed the memory"
    return outcome


def assert_resets(machine: Machine, *steps: Record) -> None:
    """Assert that `reset` undoes `steps` completely, twice, with equal outcomes."""
    before = machine.snapshot()
    first = [machine.apply(step) for step in steps]
    machine.reset()
    assert machine.snapshot() == before, "reset does not restore the marked state"
    assert [machine.apply(step) for step in steps] == first, "the same steps give other outcomes after a reset"
    machine.reset()


def assert_offsets(layout: type[Layout], expected: Mapping[str, tuple[int, int]], size: int) -> None:
    """Assert offset and length in bytes of fields against numbers typed from the document, and the size."""
    assert size == layout.SIZE, f"{layout.__name__} has {layout.SIZE:#x} bytes, the document says {size:#x}"
    for name, (offset, length_bytes) in expected.items():
        info = layout.FIELDS[name]
        assert (info.offset, info.length_bytes) == (offset, length_bytes), f"{layout.__name__}.{name} is at {info}"


def step_strategy(vocabulary: Vocabulary) -> SearchStrategy[Record]:
    """A Hypothesis strategy of any step of `vocabulary`, with any values its fields can carry."""
    from hypothesis import strategies as st

    return st.one_of(
        [_record(record) for record in vocabulary.kinds.values() if spec_of(record).is_step],
    )


def _record(record: type) -> SearchStrategy[Record]:
    from hypothesis import strategies as st

    spec: RecordSpec = spec_of(record)
    numbers = st.one_of(st.integers(0, 4), st.sampled_from(INTERESTING_NUMBERS), st.integers(0, (1 << 64) - 1))
    by_type: dict[type, SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: numbers,
        bytes: st.binary(max_size=64),
        str: st.sampled_from(("", "wbinvd", "invd", "clflush", "sev", "x")),
        tuple: st.lists(st.tuples(st.sampled_from(("rax", "rip", "cr0", "cr3", "cr4", "efer", "bogus")), numbers)).map(
            tuple
        ),
    }
    return st.tuples(*(by_type[field.type] for field in spec.fields)).map(lambda values: record(*values))
