"""The same guest through the GHCB: every request carries what the plain guest's log shows."""

from functools import cache

import pytest
from sevlab.core.events import GuestExit
from sevlab.traces.importers import kvm_exits as ke
from sevlab.traces.importers.catalogue import open_capture
from sevlab.traces.replay.feature import FeatureReplay

from tests.vectors import capture_set

TINY = "kvm-svm-tiny.trace.txt.xz"


@cache
def entries():
    return tuple(open_capture(capture_set(TINY)).entries())


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["sev-es", "snp"])
def test_requests_carry_what_the_log_shows(feature):
    tally = FeatureReplay(feature).run(entries())
    assert [group.first.text() for group in tally.divergences.values()] == []
    assert tally.total_exchanges == 3707
    assert tally.checked["ioio", "port"] == 1594 + 63 + 8
    assert tally.checked["cpuid", "leaf"] == 406
    assert tally.checked["npf", "address"] >= 1100
    assert tally.explained["cannot: MMIO write"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "field"),
    [(ke.KvmPio, "port"), (ke.KvmPio, "size"), (ke.KvmCpuid, "leaf"), (ke.KvmMmio, "gpa"), (ke.KvmMmio, "length")],
)
def test_a_corrupted_access_is_noticed(kind, field):
    rows = []
    for entry in entries():
        records = entry.outcome
        if isinstance(entry.step, GuestExit) and any(type(record) is kind for record in records):
            records = tuple(
                record._replace(**{field: getattr(record, field) ^ 1}) if type(record) is kind else record
                for record in records
            )
        rows.append(entry._replace(outcome=records))
        if len(rows) > 600:
            break
    assert FeatureReplay("sev-es").run(rows).total_diverged >= 1
