"""A document is what its schema says, or the error says where it is not."""

import copy
from typing import Any

import pytest

from tests.unit.bench.bench_testing import Play
from zquant.bench.schema import DOCUMENT, MEASURED, Maybe, check, check_shape
from zquant.errors import FormatError


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        return Play(tmp_path_factory.mktemp("play"), patch).bench()


@pytest.fixture
def document(good: Any) -> Any:
    return copy.deepcopy(good)


def test_a_document_is_valid_and_may_hold_more(document: Any) -> None:
    document["later"] = 1
    document["sizes"][0]["later"] = 1
    check(document)


@pytest.mark.parametrize("key", DOCUMENT)
def test_every_key_is_needed(document: Any, key: str) -> None:
    del document[key]
    with pytest.raises(FormatError, match=f"^r.json: ({key} is missing|schema is None)"):
        check(document, "r.json")


@pytest.mark.parametrize("key", MEASURED)
def test_every_figure_of_a_size_is_needed_unless_it_failed(document: Any, key: str) -> None:
    row = document["sizes"][0]
    del row[key]
    with pytest.raises(FormatError, match=rf"the document: sizes\[0\].{key} is missing"):
        check(document)
    row["failure"] = "memory ran out"
    check(document)


def test_another_schema_is_told(document: Any) -> None:
    document["schema"] = "zquant-bench-2"
    with pytest.raises(FormatError, match="schema is 'zquant-bench-2'; expected 'zquant-bench-1'"):
        check(document)


@pytest.mark.parametrize("value", [[], None, "text", 3])
def test_what_is_no_object_is_no_document(value: Any) -> None:
    with pytest.raises(FormatError, match="schema is None"):
        check(value)


def test_a_wrong_type_is_told_with_its_place(document: Any) -> None:
    document["sizes"][0]["warm"]["step_s"]["median"] = "fast"
    said = r"sizes\[0\].warm.step_s.median is 'fast'; expected a number. Make it again with"
    with pytest.raises(FormatError, match=said):
        check(document)


@pytest.mark.parametrize(
    ("value", "shape", "expected"),
    [
        (True, int, "a whole number"),
        (True, float, "a number"),
        (1, bool, "true or false"),
        (1.5, int, "a whole number"),
        (float("nan"), float, "a number"),
        (float("inf"), float, "a number"),
        (None, str, "text"),
        ({}, [int], "a list"),
        ([1, "2"], [int], "a whole number"),
        ([], {"a": int}, "an object"),
        ("x", Maybe(int), "a whole number"),
    ],
    ids=repr,
)
def test_what_does_not_fit(value: Any, shape: Any, expected: str) -> None:
    with pytest.raises(FormatError, match=f"expected {expected}"):
        check_shape(value, shape, "here")


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (1, float),
        (1, int),
        (False, bool),
        (None, Maybe(int)),
        (3, Maybe(int)),
        ([], [int]),
        ({"a": [1], "b": 0}, {"a": [int]}),
    ],
    ids=repr,
)
def test_what_fits(value: Any, shape: Any) -> None:
    check_shape(value, shape, "here")
