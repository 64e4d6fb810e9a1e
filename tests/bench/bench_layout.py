"""Layouts and state machines against their floor; the GHCB is that of `tests/core/test_layout.py`."""

from __future__ import annotations

from enum import Enum, IntEnum
from struct import Struct

from sevlab.core.buffers import SharedBuffer, SharedFetches
from sevlab.core.memory import Memory
from sevlab.core.statemachine import StateMachine

from tests.bench.harness import Bench, Row
from tests.core.test_layout import GHCB_VALID_BITS, Ghcb

CORE_FIELDS = {
    "rax": 1,
    "rcx": 2,
    "sw_exit_code": 0x72,
    "sw_exit_info_1": 0,
    "sw_exit_info_2": 0,
    "sw_scratch": 0x800,
    "protocol_version": 2,
}


class Plain:
    """The floor of a field read: one slot."""

    __slots__ = ("rax",)

    def __init__(self) -> None:
        self.rax = 1


def layouts(bench: Bench) -> list[Row]:
    """Live reads, snapshot reads, decode and build."""
    full = dict.fromkeys(GHCB_VALID_BITS, 1)
    store = Memory(1 << 30)
    store.write(0x3000, Ghcb.build(**full), None, 1)
    shared = SharedBuffer(SharedFetches(store), 0x3000, 4096, None, 1)
    window, snapshot, floor = Ghcb(shared), Ghcb.snapshot(shared), Plain()
    page, u64_, image = bytes(4096), Struct("<Q"), Ghcb.build(**full)
    exchange = Ghcb.build(**CORE_FIELDS)
    raw = bench(lambda: u64_.unpack_from(page, 0x390)[0])
    slot = bench(lambda: floor.rax)
    bare, ruled, read = bench(lambda: window.ghcb_usage), bench(lambda: window.rax), bench(lambda: snapshot.rax)
    all_valid, few_valid = bench(lambda: Ghcb.from_bytes(image)), bench(lambda: Ghcb.from_bytes(exchange))
    build = bench(lambda: Ghcb.build(**CORE_FIELDS))
    return [
        ("counted live read, to raw unpack_from", bare / raw, f"{bare:.3f} us (target 0.4)"),
        ("live read with a valid bit (two fetches)", ruled / raw, f"{ruled:.3f} us"),
        ("snapshot field read, to a slot read", read / slot, f"{read:.3f} us (target 0.1)"),
        (f"decode of {len(Ghcb.FIELDS)} fields, all valid", all_valid / raw, f"{all_valid:.2f} us (target 2.5)"),
        (f"decode of {len(Ghcb.FIELDS)} fields, an exchange's six valid", few_valid / raw, f"{few_valid:.2f} us"),
        (f"build of {len(CORE_FIELDS)} fields", build / raw, f"{build:.2f} us (target 4)"),
    ]


def state_machines(bench: Bench) -> list[Row]:
    """`next`, by the kind of enumeration: a plain Enum hashes in Python."""
    rows: list[Row] = []
    for base in (Enum, IntEnum):
        state, message = base("State", "A B"), base("Message", "X Y")
        machine = StateMachine(
            name="bench", initial=state.A, reject=None, table={state.A: {message.X: state.B}, state.B: {}}
        )
        here, sent = state.A, message.X
        floor = bench(lambda table={(1, 1): 2}: table.get((1, 1)))
        took = bench(lambda machine=machine, here=here, sent=sent: machine.next(here, sent))
        rows.append(
            (f"next with {base.__name__}, to a dictionary of numbers", took / floor, f"{took:.3f} us (target 0.1)")
        )
    return rows


GROUPS = (layouts, state_machines)
