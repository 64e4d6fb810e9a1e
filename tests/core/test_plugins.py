from __future__ import annotations

from types import ModuleType

import pytest
import sevlab_stranger as stranger
from sevlab.core import plugins
from sevlab.core.errors import PluginError
from sevlab.core.hookspecs import hookimpl


def module(name, requires=(), **hooks):
    made = ModuleType(name, f"Plugin {name}.")
    made.REQUIRES = requires
    for hook, function in hooks.items():
        setattr(made, hook, function)
    return made


def load(**given):
    return plugins.load(list(given), given=given)


def test_built_in_features_are_ordinary_entry_points():
    assert plugins.installed()["sme"].value == "sevlab.plugins.sme"
    (sme,) = plugins.load(["sme"]).plugins
    assert (sme.distribution, sme.requires) == ("sevlab", ())
    assert sme.summary.startswith("SME:")


def test_requirements_come_first_whatever_the_order_given():
    chain = {"c": module("c", ("b",)), "a": module("a"), "b": module("b", ("a",))}
    for names in (["c", "b", "a"], ["a", "b", "c"], ["c"]):
        assert plugins.load(names, given=chain).names == ("a", "b", "c")


def test_hooks_are_called_in_dependency_order():
    order = []

    def hook(name):
        @hookimpl
        def sevlab_layouts():
            order.append(name)
            return ()

        return sevlab_layouts

    load(
        top=module("top", ("middle",), sevlab_layouts=hook("top")),
        middle=module("middle", ("bottom",), sevlab_layouts=hook("middle")),
        bottom=module("bottom", sevlab_layouts=hook("bottom")),
    ).call("sevlab_layouts")
    assert order == ["bottom", "middle", "top"]


def test_a_plugin_that_is_not_installed_is_named_with_the_nearest():
    with pytest.raises(PluginError, match="no plugin 'smme' is installed; did you mean 'sme'"):
        plugins.load(["smme"])
    with pytest.raises(PluginError, match="no plugin 'qqqqq' is installed; installed are"):
        plugins.load(["qqqqq"])


def test_a_missing_requirement_names_both():
    with pytest.raises(PluginError, match="no plugin 'basement' is installed, which plugin 'house' requires"):
        load(house=module("house", ("basement",)))


def test_a_circle_is_shown():
    with pytest.raises(PluginError, match="require each other in a circle: (a -> b -> a|b -> a -> b)"):
        load(a=module("a", ("b",)), b=module("b", ("a",)))


@pytest.mark.parametrize("requires", ["sme", ["sme"], (1,)])
def test_requires_must_be_a_tuple_of_names(requires):
    with pytest.raises(PluginError, match="expected a tuple of plugin names"):
        load(x=module("x", requires))


def test_an_unknown_hook_is_refused_with_the_nearest():
    @hookimpl
    def sevlab_layout():
        return ()

    with pytest.raises(PluginError, match="plugin 'x': unknown hook 'sevlab_layout'; did you mean sevlab_layouts"):
        load(x=module("x", sevlab_layout=sevlab_layout))


def test_wrong_hook_arguments_are_refused():
    @hookimpl
    def sevlab_register(machine):
        pass

    with pytest.raises(PluginError, match=r"plugin 'x': .*machine"):
        load(x=module("x", sevlab_register=sevlab_register))


@pytest.mark.parametrize("option", ["tryfirst", "trylast", "wrapper"])
def test_call_order_options_are_refused(option):
    def sevlab_layouts():
        return (yield)

    hook = hookimpl(**{option: True})(sevlab_layouts if option == "wrapper" else lambda: ())
    hook.__name__ = "sevlab_layouts"
    with pytest.raises(PluginError, match="order comes from REQUIRES alone"):
        load(x=module("x", sevlab_layouts=hook))


def test_a_plugin_that_fails_to_import_is_named(monkeypatch):
    from importlib.metadata import EntryPoint

    broken = EntryPoint("broken", "no.such.module", plugins.GROUP)
    monkeypatch.setattr(plugins, "installed", lambda group: {"broken": broken})
    with pytest.raises(PluginError, match=r"plugin 'broken' \(no\.such\.module\) fails to import: ModuleNotFound"):
        plugins.load(["broken"])


def test_two_distributions_with_one_plugin_name_are_refused(monkeypatch):
    from importlib import metadata

    twins = [metadata.EntryPoint("sme", value, plugins.GROUP) for value in ("sevlab.plugins.sme", "other.sme")]
    monkeypatch.setattr(metadata, "entry_points", lambda group: twins)
    with pytest.raises(
        PluginError, match="two installed plugins are called 'sme': sevlab.plugins.sme .* and other.sme"
    ):
        plugins.installed()


def test_tracing_prints_each_call_and_result(monkeypatch, capsys):
    monkeypatch.setenv("SEVLAB_TRACE_PLUGINS", "1")
    load(sme=plugins.load(["sme"]).plugins[0].module, stranger=stranger).call("sevlab_options")
    text = capsys.readouterr().err
    assert "sevlab plugins: sevlab_options() -> stranger" in text
    assert "sevlab_options = [(Option(name='step'" in text
    monkeypatch.setenv("SEVLAB_TRACE_PLUGINS", "0")
    load(stranger=stranger).call("sevlab_options")
    assert capsys.readouterr().err == ""


def test_calling_one_plugin_calls_no_other():
    loaded = load(stranger=stranger)
    assert [option.name for option in loaded.call_one("sme", "sevlab_options")] == ["enabled"]
    assert loaded.call_one("sme", "sevlab_oracles") is None
