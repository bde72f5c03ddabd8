import pytest

from zquant.env import VARIABLES, Variable

SWITCH = Variable("ZQUANT_EXAMPLE", "0", "an example")


def test_unset_and_empty_mean_the_default(monkeypatch):
    monkeypatch.delenv(SWITCH.name, raising=False)
    assert SWITCH.value == "0"
    monkeypatch.setenv(SWITCH.name, "")
    assert SWITCH.value == "0"


@pytest.mark.parametrize("text", ["0", "false", "No", "OFF", ""])
def test_off(monkeypatch, text):
    monkeypatch.setenv(SWITCH.name, text)
    assert not SWITCH.is_on


@pytest.mark.parametrize("text", ["1", "true", "yes", "anything"])
def test_on(monkeypatch, text):
    monkeypatch.setenv(SWITCH.name, text)
    assert SWITCH.is_on


def test_names_are_unique_and_ours():
    names = [variable.name for variable in VARIABLES]
    assert len(set(names)) == len(names)
    assert all(name.startswith("ZQUANT_") for name in names)
