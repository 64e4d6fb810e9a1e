from __future__ import annotations

import pytest
from sevlab.core.errors import CampaignError, ConfigError
from sevlab.core.events import Resumed
from sevlab.core.vocabulary import Outcome
from sevlab.fuzz.setup import NOTHING, Setup, scalar
from sevlab.fuzz.store import Store
from sevlab.fuzz.targets import target_named
from sevlab.fuzz.triage import Triage, outcome_difference
from sevlab.plugins.sev_es import Ghcb, Vmgexit
from sevlab.plugins.sev_es.fuzzing import GHCB_GPA

S07 = Setup(settings=("seeded.bugs=S07",))
IMPOSSIBLE_XCR0 = Vmgexit(
    0, GHCB_GPA, Ghcb.build(sw_exit_code=0x72, sw_exit_info_1=0, sw_exit_info_2=0, rax=0xD, rcx=1, xcr0=5)
)


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("0x10", 16), ("true", True), ("linux", "linux"), ('"7"', "7"), ("[1]", "[1]"), ("1.5", "1.5")],
)
def test_a_setting_is_read_as_toml_or_is_a_text(text, value):
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


def test_settings_go_over_a_targets_options_and_their_plugins_join():
    target = Setup(settings=("sev_es.guest=edk2", "seeded.bugs=S14")).target("vc")
    assert target.options["sev_es"]["guest"] == "edk2"
    assert target.options["seeded"] == {"bugs": "S14"}
    assert "seeded" in target.plugins
    assert NOTHING.target("vc") == target_named("vc")


@pytest.mark.parametrize("item", ["seeded.bugs", "bugs=S07", ".x=1", "seeded.=1"])
def test_a_setting_of_another_form_is_named(item):
    with pytest.raises(ConfigError, match=r"expected PLUGIN.OPTION=VALUE"):
        Setup(settings=(item,)).target("ghcb")


def test_an_option_or_plugin_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="frob"):
        Setup(settings=("seeded.frob=1",)).runner("ghcb")
    with pytest.raises(ConfigError, match=r"--given 'x=no.such.module': No module"):
        Setup(given=("x=no.such.module",)).target("ghcb")
    with pytest.raises(ConfigError, match="expected NAME=MODULE"):
        Setup(given=("x",)).target("ghcb")
    with pytest.raises(CampaignError, match="no target 'frob'"):
        NOTHING.target("frob")


def test_a_story_says_how_a_correct_machine_answers(tmp_path):
    store = Store(tmp_path / "c", create=True)
    S07.keep(store)
    work = Triage(store)
    runner = work.runner("ghcb")
    found = runner.run((IMPOSSIBLE_XCR0,)).findings
    assert [finding.rule for finding in found] == ["xcr0"] * len(found)
    store.add_finding("ghcb", found[0], runner.codec.encode((IMPOSSIBLE_XCR0,)), flaky=False)
    (stored,) = work.all()
    lines = "\n".join(work.story(stored))
    assert "Source: 24594, XSETBV" in lines
    assert "xcr0=0x0" in lines  # marked valid, and as small as it gets
    assert "a correct machine answers the same" in lines
    assert S07.without_faults() == NOTHING


def test_a_difference_names_the_field_and_the_correct_value():
    one, other = (Outcome((Resumed(0, rip),)) for rip in (1, 2))
    assert list(outcome_difference(one.records, other.records)) == ["resumed.rip is 0x1, correct is 0x2"]
    assert list(outcome_difference((), other.records)) == ["nothing instead of resumed"]
    assert list(outcome_difference(one.records, one.records)) == []
