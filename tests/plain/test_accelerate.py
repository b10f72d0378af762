"""The framework of `accelerate`, with programs of the tests' own."""

import logging
import re
import sys
from importlib.metadata import PackageNotFoundError
from types import ModuleType

import pytest

import numba_dequant as nd
from numba_dequant import integrations
from numba_dequant.integrations import patching
from numba_dequant.integrations.patching import Replacement, require_version


def theirs():
    return "theirs"


def second():
    return "theirs too"


def ours():
    return "ours"


@pytest.fixture
def program(monkeypatch):
    """Makes "gguf" stand for a module of two functions; its `replacements` may be changed."""
    module, user, integration = (ModuleType(name) for name in ("their_module", "their_user", "integration"))
    module.function, module.second, user.by_name = theirs, second, theirs
    for each in (module, user):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    integration.replacements = lambda: [Replacement(module, "function", ours), Replacement(module, "second", ours)]
    monkeypatch.setattr(integrations, "_module", {"gguf": integration}.__getitem__)
    module.user, module.integration = user, integration
    return module


def assert_restored(program):
    assert program.function is program.user.by_name is theirs
    assert program.second is second


def test_one_line_in_and_one_line_out(program):
    replaced = nd.accelerate("gguf")
    assert program.function is program.second is program.user.by_name is ours
    replaced.undo()
    assert_restored(program)
    replaced.undo()
    assert_restored(program)


def test_undone_twice_leaves_what_came_between(program):
    first = nd.accelerate("gguf")
    first.undo()
    with nd.accelerate("gguf"):
        first.undo()
        assert program.function is ours
    assert_restored(program)


def test_a_context_manager_restores_after_an_error(program):
    with pytest.raises(ZeroDivisionError), nd.accelerate("gguf"):
        assert program.function is ours
        raise ZeroDivisionError
    assert_restored(program)


def test_nested(program):
    with nd.accelerate("gguf"):
        with nd.accelerate("gguf") as inner:
            assert "nothing, because everything was replaced before" in str(inner)
        assert program.function is program.user.by_name is ours
    assert_restored(program)


def test_only_the_owner_changes_if_not_everywhere(program):
    program.integration.replacements = lambda: [Replacement(program, "function", ours, everywhere=False)]
    with nd.accelerate("gguf"):
        assert program.function() == "ours"
        assert program.user.by_name() == "theirs"
    assert_restored(program)


def test_a_function_that_someone_else_has_replaced_since_stays(program):
    def someone_elses():
        return "someone else's"

    with nd.accelerate("gguf"):
        program.function = someone_elses
    assert program.function is someone_elses
    assert program.user.by_name is theirs


def test_this_package_keeps_the_originals(program, monkeypatch):
    monkeypatch.setitem(sys.modules, "numba_dequant.keeper", keeper := ModuleType("numba_dequant.keeper"))
    keeper.original = theirs
    with nd.accelerate("gguf"):
        assert keeper.original() == "theirs"


def test_methods_of_a_class_are_replaced(program):
    class Layer:
        def forward(self):
            return "theirs"

    original = Layer.forward
    program.integration.replacements = lambda: [Replacement(Layer, "forward", lambda self: "ours")]
    with nd.accelerate("gguf") as replaced:
        assert Layer().forward() == "ours"
        assert f"{__name__}.test_methods_of_a_class_are_replaced.<locals>.Layer.forward" in str(replaced)
    assert Layer.forward is original


def test_one_message_says_what_is_replaced(program, caplog):
    with caplog.at_level(logging.WARNING, "numba_dequant"), nd.accelerate("gguf", "gguf") as replaced:
        text = "numba_dequant replaces their_module.function, their_module.second"
        assert str(replaced) == text
        assert [record.getMessage() for record in caplog.records] == [text]


def test_all_or_none(program, caplog):
    good = program.integration.replacements()
    program.integration.replacements = lambda: [*good, Replacement(program, "no_such_function", ours)]
    with pytest.raises(nd.OptionError, match=r"their_module\.no_such_function does not exist; install a version"):
        nd.accelerate("gguf")
    assert_restored(program)
    assert not caplog.records


def test_nothing_is_replaced_before_every_program_is_known(program):
    with pytest.raises(nd.OptionError, match="unknown program 'gugf'; choose from gguf, transformers"):
        nd.accelerate("gguf", "gugf")
    assert_restored(program)


def test_a_name_is_needed():
    with pytest.raises(nd.OptionError, match="accelerate got no program; pass one or more of gguf, transformers"):
        nd.accelerate()


def test_a_module_that_cannot_be_imported_is_an_option_error(monkeypatch):
    def import_module(name):
        raise ImportError("numba_dequant.torch needs PyTorch; install it")

    monkeypatch.setattr(integrations, "import_module", import_module)
    with pytest.raises(nd.OptionError, match=r"functions of vllm: numba_dequant\.torch needs PyTorch; install it"):
        nd.accelerate("vllm")


# Versions


def install(monkeypatch, number):
    def version(package):
        if number is None:
            raise PackageNotFoundError(package)
        return number

    monkeypatch.setattr(patching, "version", version)


@pytest.mark.parametrize("number", ["0.10", "0.10.0", "0.17.1", "0.19.0", "0.19.5", "0.19.0.dev1", "0.19rc1"])
def test_known_versions(monkeypatch, number):
    install(monkeypatch, number)
    require_version("gguf", "0.10", "0.19")


@pytest.mark.parametrize("number", ["0.9.1", "0.20", "0.20.0", "1.0", "0.190", "unknown"])
def test_unknown_versions_are_refused(monkeypatch, number):
    install(monkeypatch, number)
    sentence = (
        f"gguf {number} is unknown to numba_dequant, which knows 0.10 to 0.19; install one of these versions, "
        "or a newer numba_dequant"
    )
    with pytest.raises(nd.OptionError, match=f"^{re.escape(sentence)}$"):
        nd.accelerate("gguf")


def test_a_package_that_is_not_installed(monkeypatch):
    install(monkeypatch, None)
    with pytest.raises(nd.OptionError, match=r"^gguf is not installed; install it with: pip install gguf$"):
        nd.accelerate("gguf")


def test_a_function_that_cannot_be_replaced_restores_those_before_it(program):
    """A module may refuse to be changed; the error is its own."""

    class Fixed(ModuleType):
        def __setattr__(self, name, value):
            raise AttributeError("this module is fixed")

    fixed = Fixed("their_fixed")
    vars(fixed)["function"] = theirs
    program.integration.replacements = lambda: [
        Replacement(program, "second", ours),
        Replacement(fixed, "function", ours),
    ]
    with pytest.raises(AttributeError, match="this module is fixed"):
        nd.accelerate("gguf")
    assert_restored(program)
    assert fixed.function is theirs
