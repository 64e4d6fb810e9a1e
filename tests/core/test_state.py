from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sevlab.core.state import Journal, StateDict, Stateful, capture, new, parts, restore


class Leaf(Stateful):
    number: int = 0
    text: str = ""


class Root(Stateful):
    count: int = 0
    leaf: Leaf = new(Leaf)
    table: StateDict[int, Leaf] = new(StateDict)
    numbers: StateDict[int, int] = new(StateDict)


def marked() -> tuple[Root, Journal]:
    root = Root()
    root.table[1] = Leaf(number=1)
    journal = Journal()
    journal.mark([root])
    return root, journal


def test_reset_restores_a_field_of_a_nested_object():
    root, journal = marked()
    root.leaf.number = 5
    journal.reset()
    assert root.leaf.number == 0


def test_reset_restores_an_element_of_a_container():
    root, journal = marked()
    root.table[1].number = 9
    root.table[2] = Leaf()
    del root.table[1]
    journal.reset()
    assert list(root.table) == [1]
    assert root.table[1].number == 1


def test_reset_works_again_after_a_reset():
    root, journal = marked()
    for value in (3, 4):
        root.count = value
        root.numbers[7] = value
        journal.reset()
        assert (root.count, dict(root.numbers)) == (0, {})


def test_only_changed_objects_are_in_the_journal():
    root, journal = marked()
    root.leaf.number = 1
    root.leaf.text = "x"
    assert journal.changed == [root.leaf]


def test_the_parts_of_a_tree_are_all_its_objects_and_containers():
    root, _ = marked()
    assert [id(part) for part in parts((root, 7))] == [
        id(item) for item in (root, root.leaf, root.table, root.table[1], root.numbers)
    ]


def test_reading_notes_nothing():
    root, journal = marked()
    assert (root.count, root.leaf.number, root.table.get(1), len(root.numbers)) == (0, 0, root.table[1], 0)
    assert not journal.changed


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.pop(1),
        lambda table: table.clear(),
        lambda table: table.update({2: 3}),
        lambda table: table.setdefault(2, 3),
        lambda table: table.popitem(),
        lambda table: table.__ior__({2: 3}),
    ],
)
def test_every_mutator_of_a_container_is_journaled(change):
    table: StateDict[int, int] = StateDict({1: 1})
    journal = Journal()
    journal.mark([table])
    change(table)
    assert dict(table) != {1: 1}
    journal.reset()
    assert dict(table) == {1: 1}


def test_a_field_without_default_is_refused():
    with pytest.raises(TypeError, match="needs a default for broken"):

        class Broken(Stateful):
            broken: int


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="has no field 'wrong'"):
        Leaf(wrong=1)


def test_defaults_are_not_shared():
    assert Root().table is not Root().table


def test_restore_brings_back_what_capture_took():
    root, _ = marked()
    image = capture(root)
    root.count = 5
    root.table[1].text = "changed"
    root.table[3] = Leaf(number=3)
    restore(root, image)
    assert capture(root) == image


def test_restore_makes_objects_that_are_gone():
    root, _ = marked()
    image = capture(root)
    root.table.clear()
    restore(root, image)
    assert root.table[1].number == 1


def test_two_trees_share_nothing():
    first, _ = marked()
    second, _ = marked()
    first.leaf.number = 1
    assert second.leaf.number == 0


class JournalAgainstCopies(RuleBasedStateMachine):
    """Random changes, marks and resets against plain copies."""

    def __init__(self) -> None:
        super().__init__()
        self.root, self.journal = marked()
        self.expected = capture(self.root)

    @rule(value=st.integers(0, 9))
    def field(self, value):
        self.root.count = value

    @rule(value=st.integers(0, 9))
    def nested(self, value):
        self.root.leaf.number = value

    @rule(key=st.integers(0, 3), value=st.integers(0, 9))
    def element(self, key, value):
        self.root.table.setdefault(key, Leaf()).number = value

    @rule(key=st.integers(0, 3))
    def remove(self, key):
        self.root.table.pop(key, None)

    @rule()
    def mark(self):
        self.journal.mark([self.root])
        self.expected = capture(self.root)

    @rule()
    def reset(self):
        self.journal.reset()
        assert capture(self.root) == self.expected

    @rule()
    def round_trip(self):
        image = capture(self.root)
        self.root.count += 1
        self.root.table.clear()
        restore(self.root, image)
        assert capture(self.root) == image

    @invariant()
    def journal_has_no_doubles(self):
        assert len({id(item) for item in self.journal.changed}) == len(self.journal.changed)


TestJournalAgainstCopies = JournalAgainstCopies.TestCase
