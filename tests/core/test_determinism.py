from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.determinism import TSC_HZ, Clock, Entropy
from sevlab.core.errors import ConfigError


@given(st.binary(max_size=40), st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 100))))
def test_a_stream_does_not_depend_on_the_others(seed, draws):
    mixed = Entropy(seed=seed)
    found = [(stream, mixed.take(stream, length)) for stream, length in draws]
    for name in "ab":
        alone = Entropy(seed=seed)
        assert [data for stream, data in found if stream == name] == [
            alone.take(name, length) for stream, length in draws if stream == name
        ]


def test_streams_seeds_and_positions_differ():
    entropy = Entropy(seed=b"s")
    drawn = {entropy.take("a", 32), entropy.take("a", 32), entropy.take("b", 32), Entropy(seed=b"t").take("a", 32)}
    assert len(drawn) == 4


def test_seed_and_stream_name_do_not_run_together():
    assert Entropy(seed=b"ab").take("c", 16) != Entropy(seed=b"a").take("bc", 16)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 64, 1000])
def test_any_length_is_served(length):
    assert len(Entropy(seed=b"s").take("a", length)) == length
    assert Entropy(seed=b"s").take_int("a", length) < 1 << 8 * length or length == 0


def test_a_negative_length_is_refused():
    with pytest.raises(ConfigError, match="asked for -1 bytes"):
        Entropy(seed=b"s").take("a", -1)


def test_the_clock_moves_only_when_told_and_wraps():
    clock = Clock()
    assert clock.advance(TSC_HZ) == TSC_HZ
    assert clock.nanoseconds == 1_000_000_000
    assert clock.advance((1 << 64) - TSC_HZ) == 0
