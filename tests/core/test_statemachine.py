from __future__ import annotations

from enum import Enum

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from sevlab.core.errors import PluginError
from sevlab.core.statemachine import StateMachine
from sevlab.plugins.sme import PAGE_IN_PLACE


class Door(Enum):
    OPEN = 0
    CLOSED = 1
    LOCKED = 2


class Hand(Enum):
    PUSH = 0
    PULL = 1
    TURN = 2


class Status(Enum):
    REFUSED = 9


TABLE = {
    Door.OPEN: {Hand.PUSH: Door.CLOSED},
    Door.CLOSED: {Hand.PULL: Door.OPEN, Hand.TURN: Door.LOCKED, Hand.PUSH: Door.CLOSED},
    Door.LOCKED: {Hand.TURN: Door.CLOSED},
}
DOOR = StateMachine(name="door", initial=Door.OPEN, reject=Status.REFUSED, table=TABLE)


def test_the_table_says_the_next_state():
    assert DOOR.next(Door.OPEN, Hand.PUSH) is Door.CLOSED
    assert DOOR.next(Door.CLOSED, Hand.PUSH) is Door.CLOSED


def test_absence_is_rejection():
    assert DOOR.next(Door.OPEN, Hand.TURN) is None


def test_every_pair_is_walked_once():
    pairs = list(DOOR.pairs())
    assert len(pairs) == 9
    assert sum(pair.target is not None for pair in pairs) == 5


def test_allowed_and_rejected_pairs_are_all_pairs():
    rejected = list(DOOR.rejected_pairs())
    assert len(rejected) == 4
    for pair in DOOR.pairs():
        assert DOOR.allows(pair.state, pair.message) == (pair.target is not None)
        assert ((pair.state, pair.message) in rejected) == (pair.target is None)


def test_a_machine_cannot_be_changed():
    for change in (
        lambda: setattr(DOOR, "initial", Door.LOCKED),
        lambda: delattr(DOOR, "name"),
        lambda: setattr(DOOR, "novel", 1),
    ):
        with pytest.raises(AttributeError, match="'door' is immutable"):
            change()
    with pytest.raises(TypeError):
        DOOR.table[Door.OPEN] = {}
    with pytest.raises(TypeError):
        DOOR.table[Door.OPEN][Hand.TURN] = Door.LOCKED


def test_changing_the_given_dictionary_changes_nothing():
    table = {state: dict(row) for state, row in TABLE.items()}
    machine = StateMachine(name="door", initial=Door.OPEN, reject=Status.REFUSED, table=table)
    table[Door.OPEN][Hand.TURN] = Door.LOCKED
    assert machine.next(Door.OPEN, Hand.TURN) is None


@pytest.mark.parametrize(
    ("initial", "table", "message"),
    [
        (Door.LOCKED, {Door.OPEN: {}}, "initial state .* has no row"),
        (Door.OPEN, {Door.OPEN: {Hand.PUSH: Door.CLOSED}}, "leads to .*CLOSED.* which has no row"),
        (Door.OPEN, {Door.OPEN: {Hand.PUSH: Door.OPEN, Status.REFUSED: Door.OPEN}}, "messages come from more than one"),
        (Door.OPEN, {Door.OPEN: {}, Hand.PUSH: {}}, "states come from more than one"),
    ],
)
def test_a_broken_table_is_refused(initial, table, message):
    with pytest.raises(PluginError, match=message):
        StateMachine(name="broken", initial=initial, reject=Status.REFUSED, table=table)


def test_unreachable_states_are_found():
    table = {Door.OPEN: {Hand.PUSH: Door.OPEN}, Door.LOCKED: {}}
    machine = StateMachine(name="stuck", initial=Door.OPEN, reject=Status.REFUSED, table=table)
    assert machine.unreachable() == (Door.LOCKED,)
    assert DOOR.unreachable() == ()
    assert PAGE_IN_PLACE.unreachable() == ()


def test_an_extension_adds_pairs_and_leaves_the_original_alone():
    more = DOOR.extended("door with a kick", {Door.LOCKED: {Hand.PUSH: Door.OPEN}})
    assert more.next(Door.LOCKED, Hand.PUSH) is Door.OPEN
    assert more.next(Door.OPEN, Hand.PUSH) is Door.CLOSED
    assert DOOR.next(Door.LOCKED, Hand.PUSH) is None


def test_an_extension_may_not_contradict():
    assert DOOR.extended("agreeing", {Door.OPEN: {Hand.PUSH: Door.CLOSED}}).table == DOOR.table
    with pytest.raises(PluginError, match=r"'contrary'.*but in 'door' to"):
        DOOR.extended("contrary", {Door.OPEN: {Hand.PUSH: Door.LOCKED}})


def test_the_diagram_comes_from_the_table():
    assert DOOR.mermaid().splitlines()[:3] == ["stateDiagram-v2", "    [*] --> OPEN", "    OPEN --> CLOSED: PUSH"]
    assert "| PUSH | CLOSED | CLOSED | - |" in DOOR.markdown_table()


class DoorAgainstNaive(RuleBasedStateMachine):
    """The table against what the words say."""

    def __init__(self) -> None:
        super().__init__()
        self.state = DOOR.initial
        self.shut, self.bolted = False, False

    @rule(message=st.sampled_from(Hand))
    def send(self, message):
        legal = True
        if message is Hand.PUSH and not self.bolted:
            self.shut = True
        elif message is Hand.PULL and self.shut and not self.bolted:
            self.shut = False
        elif message is Hand.TURN and self.shut:
            self.bolted = not self.bolted
        else:
            legal = False
        following = DOOR.next(self.state, message)
        assert (following is not None) == legal
        self.state = following or self.state
        naive = Door.LOCKED if self.bolted else Door.CLOSED if self.shut else Door.OPEN
        assert self.state is naive


TestDoorAgainstNaive = DoorAgainstNaive.TestCase
