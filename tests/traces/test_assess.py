"""Assessing captures: every exit accounted for, and the table that was measured independently of this model."""

import json
from collections import Counter

import pytest
from click.testing import CliRunner
from sevlab.core.errors import ConfigError
from sevlab.core.porting import Path
from sevlab.traces.assess.judge import BUCKETS, Assessor, Timeline
from sevlab.traces.assess.report import document
from sevlab.traces.commands.assess import assess
from sevlab.traces.importers.catalogue import open_capture

from tests.vectors import capture_set

TINY, TINY12, BOOT, MICROVM = (
    f"kvm-svm-{name}.trace.txt.xz" for name in ("tiny", "tiny-linux6.12", "linux-boot", "linux-microvm-smp2")
)
TABLE = {
    TINY: {"stays": 449, "automatic": 12, "NAE": 3242, "cannot": 4},
    TINY12: {"stays": 284, "automatic": 12, "NAE": 3151, "cannot": 4},
    BOOT: {"stays": 3965, "automatic": 175, "NAE": 11048, "cannot": 6},
    MICROVM: {"stays": 9088, "automatic": 243, "NAE": 55508, "cannot": 0},
}
KINDS = {
    TINY: {"IOIO": 1594, "IOIO string": 75, "MSR": 27, "CPUID": 406, "VMMCALL": 6, "WBINVD": 1, "MMIO read": 369,
           "MMIO write": 748, "MMIO string": 12, "DR7_READ": 1, "MONITOR": 1, "MWAIT": 1, "RDPMC": 1},
    BOOT: {"IOIO": 6317, "IOIO string": 2, "MSR": 2209, "CPUID": 1230, "WBINVD": 6, "MMIO read": 409,
           "MMIO write": 875},
    MICROVM: {"IOIO": 46148, "MSR": 6937, "CPUID": 1052, "VMMCALL": 5, "WBINVD": 1, "MMIO read": 443,
              "MMIO write": 922},
}  # fmt: skip
EARLY = {
    BOOT: {"stays": 641, "automatic": 46, "NAE": 1732, "cannot": 6},
    MICROVM: {"stays": 425, "automatic": 22, "NAE": 149, "cannot": 0},
}
LONG = [pytest.param(name, marks=pytest.mark.long) for name in (BOOT, MICROVM)]


def assessed(name, feature="sev-es"):
    return Assessor(feature).run(open_capture(capture_set(name)).entries())


@pytest.mark.slow
@pytest.mark.parametrize("name", [TINY, TINY12, *LONG])
def test_the_table_of_a_capture_under_sev_es(name):
    result = assessed(name)
    assert {path.value: result.total(path) for path in Path} == TABLE[name]
    assert result.exits == sum(TABLE[name].values())
    if name in KINDS:
        assert {row.kind: row.exits for row in result.rows.values() if row.path is Path.NAE} == KINDS[name]
    if name in EARLY:
        assert {path.value: result.early[path] for path in Path} == EARLY[name]
    for row in result.rows.values():
        if row.path is Path.NAE:
            assert row.executed.exits == row.exits
            assert row.executed.example


@pytest.fixture(scope="module")
def tiny():
    return assessed(TINY)


def test_what_cannot_be_served_is_named_with_its_place(tiny):
    assert {(place.rip, place.insn.hex()) for place in tiny.refused.values()} == {
        (0x1018E, "014360"), (0x10191, "874370"), (0x101BD, "c70204030201"), (0x10324, ""),
    }  # fmt: skip


def test_every_request_was_asked_by_the_reference_guest(tiny):
    rows = {row.kind: row for row in tiny.rows.values() if row.path is Path.NAE}
    for kind in ("IOIO", "CPUID", "MMIO read", "MMIO write", "IOIO string", "WBINVD"):
        assert rows[kind].executed.requests == rows[kind].exits, kind
    assert any("exit_code=0x80000002" in line for line in rows["MMIO write"].executed.example)


def test_string_instructions_are_fewer_than_their_exits(tiny):
    row = next(row for row in tiny.rows.values() if row.kind == "IOIO string")
    assert (row.exits, row.instructions) == (75, 12)


def test_under_sev_only_what_needs_guest_memory_is_lost():
    result = assessed(TINY, "sev")
    assert {row.kind for row in result.rows.values() if row.path is Path.CANNOT} >= {"IOIO string"}
    assert result.total(Path.NAE) == 0
    assert result.exits == 3707


@pytest.mark.slow
def test_what_a_log_says_of_page_states_under_snp_and_what_it_cannot():
    result = assessed(TINY, "snp")
    assert result.page_state()[0].startswith("41 faults populated memory")
    assert any("no log of exits shows" in line for line in result.page_state())
    assert Assessor("sev-es").result.page_state() == []


def test_a_feature_that_nobody_judges_is_refused():
    with pytest.raises(ConfigError, match="expected one of sev, sev-es, snp"):
        Assessor("tdx")


def test_a_timeline_keeps_every_exit_in_bounded_space():
    timeline = Timeline()
    times = [n * n * 1000 for n in range(5000)]
    for time in times:
        timeline.add(time, Path.NAE)
    assert len(timeline.counts[Path.NAE]) == BUCKETS
    expected = Counter(time // timeline.width_ns for time in times)
    assert [expected[n] for n in range(BUCKETS)] == timeline.counts[Path.NAE]


@pytest.mark.slow
def test_the_command_reports_and_writes_a_page_that_stands_alone(tmp_path):
    pytest.importorskip("plotly")
    page = tmp_path / "tiny.html"
    result = CliRunner().invoke(assess, [str(capture_set(TINY)), "--html", str(page), "--json"])
    assert result.exit_code == 1
    found = json.loads(result.output)
    assert found["paths"] == TABLE[TINY]
    text = page.read_text()
    assert "Plotly.newPlot" in text
    assert "src=" not in text.split("</head>", 1)[1]
    assert "rip" in text
    assert "c7 02 04 03 02 01" in text


def test_the_document_is_plain(tiny):
    assert json.loads(json.dumps(document(tiny)))["exits"] == 3707
