"""TCB_VERSION: bytes by generation, and the comparison by component."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.plugins.snp.tcb import Tcb

LEVEL = st.integers(0, 255)


@pytest.mark.parametrize(
    ("raw", "generation", "tcb"),
    [
        (0x7308_0000_0000_0003, "milan", Tcb(3, 0, 8, 0x73)),
        (0x5419_0000_0000_020A, "genoa", Tcb(10, 2, 25, 0x54)),
        (0x4700_0000_0302_0105, "turin", Tcb(1, 2, 3, 0x47, fmc=5)),
    ],
)
def test_the_bytes_mean_what_the_generation_says(raw, generation, tcb):
    assert Tcb.of(raw, generation) == tcb
    assert tcb.raw() == raw


@given(LEVEL, LEVEL, LEVEL, LEVEL, st.none() | LEVEL)
def test_every_tcb_comes_back(bootloader, tee, snp, microcode, fmc):
    tcb = Tcb(bootloader, tee, snp, microcode, fmc)
    assert Tcb.of(tcb.raw(), "milan" if fmc is None else "turin") == tcb


def test_tcbs_are_compared_by_component_and_not_as_numbers():
    low, high = Tcb(9, 0, 8, 1), Tcb(3, 0, 8, 2)
    assert low.raw() < high.raw()
    assert not low.at_most(high)
    assert not high.at_most(low)
    assert high.at_most(high)
    assert Tcb(3, 0, 8, 1).at_most(high)


def test_a_tcb_reads_by_its_names():
    assert str(Tcb(3, 0, 8, 115)) == "bootloader 3, tee 0, snp 8, microcode 115"
    assert str(Tcb(1, 0, 2, 71, 0)).endswith("fmc 0")
