"""The command line as a user meets it: in a process of its own where exit codes and speed matter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata

import click
import pytest
import sevlab_stranger as stranger
from click.testing import CliRunner
from sevlab.core import cli, plugins
from sevlab.core.cliapi import Capability, CommandSpec
from sevlab.core.commands.doctor import examine
from sevlab.core.errors import ConfigError, PluginError


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", "from sevlab.core.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


def invoke(*arguments):
    return CliRunner().invoke(cli.root, list(arguments))


@pytest.fixture
def with_stranger(monkeypatch):
    real = plugins.load_all
    monkeypatch.setattr(plugins, "load_all", lambda **rest: real(given={"stranger": stranger}, **rest))


def test_version_is_the_distributions():
    assert invoke("--version").output.strip() == f"sevlab {metadata.version('sevlab')}"


def test_help_lists_commands_and_exit_codes():
    text = invoke("--help").output
    for word in ("demo", "doctor", "plugins", "Exit codes"):
        assert word in text


def test_help_of_a_group_lists_its_commands():
    text = invoke("plugins", "--help").output
    assert "List the installed plugins" in text
    assert "new" in text


def test_doctor_json_is_one_document_with_every_capability():
    report = json.loads(invoke("doctor", "--json").output)
    assert report["sevlab"] == metadata.version("sevlab")
    rows = {row["name"]: row for row in report["capabilities"]}
    assert rows["aes-xts"]["state"] == "present"
    assert rows["plugin sme"]["state"] == "present"
    assert {"plotly", "trace-cmd"} <= rows.keys()


def missing():
    raise ImportError("No module named 'nothing'")


def broken():
    raise ValueError("it is broken")


@pytest.mark.parametrize(
    ("check", "state", "detail"),
    [
        (lambda: "1.0", "present", "1.0"),
        (missing, "not installed", "No module named 'nothing'"),
        (broken, "failed", "ValueError: it is broken"),
    ],
)
def test_doctor_tells_present_missing_and_failed_apart(check, state, detail):
    row = examine(Capability("thing", "something", check))
    assert (row.state, row.detail) == (state, detail)


def test_doctor_fails_when_something_required_is_missing(monkeypatch):
    monkeypatch.setattr(
        "sevlab.core.commands.doctor.KERNEL_CAPABILITIES", (Capability("thing", "all", missing, required=True),)
    )
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "needed for all" in result.output


def test_plugins_list_and_show():
    rows = json.loads(invoke("plugins", "list", "--json").output)
    assert {"io", "sme"} <= {row["name"] for row in rows if row["distribution"] == "sevlab"}
    shown = json.loads(invoke("plugins", "show", "sme", "--json").output)
    assert shown["handles"] == {"host MSR": ["0xc0010010"]}
    assert shown["options"][0]["name"] == "enabled"
    assert "host MSR: 0xc0010010" in invoke("plugins", "show", "sme").output
    assert "sme" in invoke("plugins", "list").output


def test_demo_tells_the_first_chapter():
    told = json.loads(invoke("demo", "sme", "--json").output)
    text = "\n".join(told[0]["lines"])
    assert "the same bytes" in text
    assert text.count("root:$6$salt$hash") == 5  # four views before, one after
    assert "sme" in invoke("demo", "--list").output


def test_an_unknown_chapter_is_a_configuration_error():
    result = run("demo", "nonsense")
    assert result.returncode == 2
    assert result.stderr.startswith("sevlab: configuration: demo chapter 'nonsense': expected one of captured")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plugins", "show", "smee"), "no plugin 'smee' is installed; did you mean 'sme'?"),
        (("plugins", "new", "Bad-Name"), "expected lower-case letters"),
        (("plugins", "new", "sme"), "a plugin 'sme' is installed already"),
        (("nonsense",), "No such command 'nonsense'"),
        (("doctor", "--nonsense"), "No such option"),
    ],
)
def test_what_the_user_got_wrong_is_exit_code_2_without_a_traceback(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_commands_chapters_and_capabilities_of_a_stranger_appear(with_stranger):
    assert "Say hello" in invoke("--help").output
    assert invoke("greet").output == "hello from a stranger\n"
    assert "stranger" in invoke("demo", "--list").output
    assert json.loads(invoke("demo", "stranger", "--json").output)[0]["lines"] == ["   a stranger was here"]
    assert "stranger's tool" in invoke("doctor").output


def test_a_command_brought_twice_is_refused(with_stranger, monkeypatch):
    monkeypatch.setattr(cli, "BUILT_IN", (*cli.BUILT_IN, CommandSpec("greet", "", "x:y")))
    result = invoke("--help")
    assert isinstance(result.exception, PluginError)
    assert "command 'greet' is brought twice: by 'core' and by plugin 'stranger'" in str(result.exception)


def test_a_target_that_is_no_command_is_refused():
    group = cli.LazyGroup("g", specs=lambda: (CommandSpec("x", "", "sevlab.core.units:PAGE_BYTES"),))
    with pytest.raises(PluginError, match="expected a click command"):
        group.get_command(click.Context(group), "x")


def test_a_plugin_puts_a_subcommand_beside_those_of_a_group_that_is_a_command():
    assert {"diff", "guest"} <= set(invoke("measure", "--help").output.split())
    assert invoke("--help").output.count("\n  measure ") == 1


def test_a_subcommand_of_a_command_that_is_no_group_is_refused(monkeypatch):
    monkeypatch.setattr(cli, "BUILT_IN", (*cli.BUILT_IN, CommandSpec("x", "", "x:y", "doctor")))
    assert "'doctor' is a command and no group" in str(invoke("doctor").exception)


def test_new_writes_a_package_once(tmp_path):
    first = invoke("plugins", "new", "door_bell", "--into", str(tmp_path))
    assert first.exit_code == 0
    assert (tmp_path / "sevlab-door-bell/src/sevlab_door_bell/handlers.py").is_file()
    second = invoke("plugins", "new", "door_bell", "--into", str(tmp_path))
    assert "exists already; nothing was written" in str(second.exception)
    assert not isinstance(second.exception, ConfigError)


def test_importing_the_kernel_loads_nothing_heavy():
    heavy = ("cryptography", "click", "rich", "hypothesis", "iced_x86", "unicorn", "atheris", "numpy", "pydantic")
    code = f"import sys; import sevlab.core.machine; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
