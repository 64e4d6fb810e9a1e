from __future__ import annotations

import pytest
import sevlab_stranger as stranger
from sevlab.core.errors import TraceFormatError
from sevlab.core.pages import PageImage
from sevlab.core.testing import make_machine
from sevlab.traces.machine_state import pack_pages, pack_snapshot, unpack_pages, unpack_snapshot, without_components

GIVEN = {"stranger": stranger}


def test_without_a_plugins_components_a_state_fits_the_machine_without_the_plugin():
    machine, plain = make_machine("sev", given=GIVEN), make_machine("sev")
    before = machine.snapshot()
    machine.components["sev"].snp_initialised = True
    packed = pack_snapshot(machine.snapshot(), before)
    with pytest.raises(TraceFormatError, match="a part that the machine does not have"):
        unpack_snapshot(packed, plain.snapshot())
    plain.restore(unpack_snapshot(without_components(packed, ("stranger",)), plain.snapshot()))
    assert plain.components["sev"].snp_initialised is True
    assert "stranger" not in plain.components
    assert without_components(packed, ("nobody",)) == packed


def test_a_state_in_which_nothing_changed_stays_as_it_is():
    machine = make_machine("sme", given=GIVEN)
    packed = pack_snapshot(machine.snapshot(), machine.snapshot())
    assert without_components(packed, ("stranger",)) == packed


def test_what_is_no_snapshot_is_refused():
    with pytest.raises(TraceFormatError, match="expected a snapshot, found int"):
        without_components(b"\x05", ())


def test_pages_come_back_and_what_is_none_is_refused():
    page = PageImage(None, bytes(4096), b"\x04")
    assert unpack_pages(pack_pages(((7, page),))) == ((7, page),)
    for wrong in (b"\x05", pack_pages(((7, page._replace(data=b"x")),)), pack_pages(((7, page._replace(tags=b"")),))):
        with pytest.raises(TraceFormatError):
            unpack_pages(wrong)
