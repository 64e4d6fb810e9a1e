from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sevlab.core.config import GuestConfig, MachineConfig, load_config, parse_config, parse_seed, parse_size
from sevlab.core.errors import ConfigError, SevlabError
from sevlab.core.generations import GENERATIONS
from sevlab.core.machine import Machine

GOOD = """
[machine]
generation = "genoa"
seed = 7
memory = "64 MiB"
plugins = ["sme"]
caches = true

[[guest]]
name = "linux"
vcpus = 2
memory = "4 MiB"

[plugin.sme]
enabled = true
"""


def write(tmp_path, text):
    path = tmp_path / "machine.toml"
    path.write_text(text)
    return path


def test_a_file_becomes_a_machine(tmp_path):
    config = load_config(write(tmp_path, GOOD))
    assert config == MachineConfig(
        generation="genoa",
        seed=b"\x07",
        memory_bytes=64 << 20,
        caches=True,
        plugins=("sme",),
        guests=(GuestConfig(name="linux", vcpus=2, memory_bytes=4 << 20),),
        options=config.options,
    )
    assert config.options["sme"]["enabled"] is True
    assert len(Machine(config).vcpus) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[machine]\nseed = = 1", r"not TOML: .*line 2, column 8"),
        ("[machine]\ngeneration = 'vega'", r"machine\.generation: 'vega': expected one of naples, rome, milan"),
        ("[machine]\nmemory = '12 apples'", r"machine\.memory: '12 apples': expected bytes .* '64 MiB'"),
        ("[machine]\nmemory = 4095", r"machine\.memory: 4095 bytes: expected a multiple of 4096"),
        ("[machine]\nmemory = 0", r"machine\.memory: 0 bytes"),
        ("[machine]\nmemory = '8192 TiB'", r"machine\.memory: .* to 2\^52"),
        ("[machine]\nseed = -1", r"machine\.seed: -1: expected a number from 0 or a string"),
        ("[machine]\nseed = 1.5", r"machine\.seed: 1\.5"),
        ("[machine]\ncaches = 1", r"machine\.caches: 1 is not true or false"),
        ("[machine]\nplugins = 'sme'", r"machine\.plugins: 'sme': expected a list of plugin names"),
        ("[machine]\nplugins = [1]", r"machine\.plugins: \[1\]: expected a list"),
        ("[machine]\ncolour = 1", r"machine\.colour: unknown key; expected one of generation, seed"),
        ("[engine]\n", r"engine: unknown key; expected one of machine, guest, plugin"),
        ("machine = 5", r"machine: 5: expected a table"),
        ("[guest]\nvcpus = 1", r"guest: .*expected \[\[guest\]\] tables"),
        ("[[guest]]\nvcpus = 0", r"guest\[0\]\.vcpus: 0: expected a number from 1 to 512"),
        ("[[guest]]\n[[guest]]\nvcpus = 513", r"guest\[1\]\.vcpus: 513: expected a number from 1 to 512"),
        ("[[guest]]\nvcpus = '1'", r"guest\[0\]\.vcpus: '1' is not a number"),
        ("[[guest]]\nname = 1", r"guest\[0\]\.name: 1 is not a string"),
        ("[[guest]]\nmemory = 1", r"guest\[0\]\.memory: 1 bytes"),
        ("[[guest]]\ncolour = 1", r"guest\[0\]\.colour: unknown key"),
        ("plugin = 1", r"plugin: 1: expected a table"),
        ("[plugin]\nsme = 1", r"plugin\.sme: 1: expected a table"),
    ],
)
def test_what_is_wrong_is_named_with_file_key_value_and_legal_values(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_and_bytes_that_are_no_text_are_named(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.toml")
    path = tmp_path / "binary.toml"
    path.write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="byte 0x5 is not UTF-8"):
        load_config(path)


@given(st.dictionaries(st.text(), st.recursive(st.integers() | st.text() | st.booleans(), st.lists, max_leaves=4)))
def test_any_document_is_a_configuration_or_a_configuration_error(document):
    with contextlib.suppress(SevlabError):
        parse_config(document)


@pytest.mark.parametrize(
    ("text", "size"), [("1 B", 1), ("4096", None), ("2KiB", 2048), (" 3 GiB ", 3 << 30), (17, 17), (True, None)]
)
def test_sizes(text, size):
    if size is None:
        with pytest.raises(ConfigError):
            parse_size(text, "here")
    else:
        assert parse_size(text, "here") == size


def test_seeds_are_numbers_or_texts():
    assert [parse_seed(seed) for seed in (0, 255, 256, "x")] == [b"\0", b"\xff", b"\0\1", b"x"]


@pytest.mark.parametrize("name", GENERATIONS)
def test_each_generation_makes_a_machine_with_its_key_size(name):
    machine = Machine(MachineConfig(generation=name))
    assert machine.memory.key_bits == (256 if name == "turin" else 128)


def test_the_defaults_are_a_machine():
    assert Machine().config.part.name == "milan"
