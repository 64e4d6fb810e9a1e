"""The importers' fuzz targets, and what they have found."""

import gzip

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.errors import InvariantViolation, TraceFormatError
from sevlab.fuzz import import_targets
from sevlab.fuzz.import_targets import IMPORTERS, import_target, sample
from sevlab.traces.importers.events import EVENTS, parse_event

TARGETS = {name: import_target(name) for name in IMPORTERS}
SEEDS = {name: list(importer.seeds()) for name, importer in IMPORTERS.items()}
NAMES = st.sampled_from(list(IMPORTERS))
HEAD = b" cpu-7  [000] d..1.  12.345678: "
EXIT = b"kvm_exit: vcpu 0 reason io rip 0xfff0 info1 0x3f80210 info2 0xfff1 intr_info 0x0 error_code 0x0\n"


@given(NAMES, st.binary(max_size=200))
def test_any_bytes_are_entries_or_a_refusal(name, data):
    TARGETS[name](data)


@given(NAMES, st.integers(0), st.lists(st.tuples(st.integers(0, 1 << 12), st.binary(max_size=6)), max_size=4))
def test_damaged_seeds_are_entries_or_a_refusal(name, number, changes):
    data = bytearray(SEEDS[name][number % len(SEEDS[name])])
    for at, new in changes:
        data[at % len(data) : at % len(data) + len(new) // 2] = new
    TARGETS[name](bytes(data))


@pytest.mark.parametrize("name", IMPORTERS)
def test_seeds_are_accepted_and_reach_exchanges(name):
    for seed in SEEDS[name]:
        TARGETS[name](seed)
    if name != "file":
        logs = [IMPORTERS[name].open(seed) for seed in SEEDS[name]]
        for log in logs:
            list(log.entries())
        assert sum(log.summary()["exchanges"] for log in logs) > 0


@pytest.mark.parametrize("name", EVENTS)
def test_the_sample_of_a_layout_is_read_by_it(name):
    for template in EVENTS[name].templates:
        assert parse_event(name, sample(template)) is not None, template


FOUND = {
    "an exit before the vCPU's first entry": ("kvm", HEAD + EXIT + HEAD + b"kvm_entry: vcpu 0, rip 0x1\n"),
    "two exits without an entry": ("kvm", HEAD + b"kvm_entry: vcpu 0, rip 0x1\n" + (HEAD + EXIT) * 2),
    "a text that is no UTF-8": ("kvm", HEAD + b"kvm_entry: vcpu \xff\xc3, rip 0x1\n"),
    "a number that is always printed where others may leave it out": (
        "kvm",
        HEAD
        + b"kvm_nested_vmexit_inject: vcpu 3 reason io rip 0x1f info1 0x1f info2 0x1f intr_info 0x1f error_code 0x1f",
    ),
    "a number past 64 bits": ("ghcb", b'["msr",2,"0x2","0x99999999999999999999","0x5"]\n'),
    "infinity": ("ghcb", b'["vc",1,1e999,"0x1","ee",[],"0x2",0]\n'),
    "a negative number": ("ghcb", b'["msr",-2,"0x2","-0x4","0x5"]\n'),
    "a record number that is a text": ("ghcb", b'["vc","1",123,"0x1","ee",[],"0x2",0]\n'),
    "a dump with three digits": ("ccp", b"sev command id 0x4 buffer 0x1 timeout 1s\n(in):  00000000: 000 01\n"),
    "a time past all clocks": ("ccp", b"[" + b"9" * 400 + b".1] sev command id 0x4 buffer 0x1 timeout 1s\n"),
    "a command number past 32 bits": ("ccp", b"sev command id 0x" + b"f" * 30 + b" buffer 0x1 timeout 1s\n"),
    "a damaged deflate stream": ("file", gzip.compress(b"kvm" * 100)[:15] + b"\xff" * 30),
    "a damaged zstd frame": ("file", zstandard.compress(b"kvm" * 100)[:9] + b"\xff" * 30),
    "a zstd window of gigabytes": ("file", b"\x28\xb5\x2f\xfd\x00\xff" + bytes(20)),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found(case):
    name, data = FOUND[case]
    TARGETS[name](data)


def test_an_exit_that_another_follows_is_an_unfinished_exchange():
    log = IMPORTERS["kvm"].open(HEAD + b"kvm_entry: vcpu 0, rip 0x1\n" + (HEAD + EXIT) * 2)
    list(log.entries())
    assert (log.summary()["exchanges"], log.summary()["unfinished"]) == (2, 2)


def test_a_summary_that_does_not_add_up_is_a_violation(monkeypatch):
    class Wrong(import_targets.KvmText):
        def summary(self):
            return super().summary() | {"rejected": 5}

    monkeypatch.setattr(import_targets, "KvmText", Wrong)
    with pytest.raises(InvariantViolation, match="lines do not add up"):
        import_target("kvm")(SEEDS["kvm"][0])


@pytest.mark.parametrize("kind", ["xz", "gz", "zst"])
def test_what_a_file_unpacks_to_is_the_same_in_every_compression(kind):
    import lzma

    text = SEEDS["ghcb"][0] * 500
    pack = {"xz": lzma.compress, "gz": gzip.compress, "zst": zstandard.compress}[kind]
    for data in (pack(text), pack(text[:700]) + pack(text[700:])):
        source = import_targets._source(data)
        assert source.stream.read() == text
    with pytest.raises((TraceFormatError, *import_targets.UNPACK_ERRORS)):
        import_targets._source(pack(text)[:-20]).stream.read()
