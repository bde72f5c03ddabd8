"""What a picture costs: the published case, and the cases around it."""

import math
from typing import Any

import pytest

from zquant.bench.cost import SCHEMA, Terms, cost_document, cost_of, cost_text, seconds_in

PUBLISHED: dict[str, Any] = {
    "hardware_price": 23_000,
    "watts": 450,
    "price_per_kwh": 0.8,
    "images_per_day": 5_000,
    "api_price": 0.04,
    "years": 3,
    "hours_per_day": 8,
    "currency": "CNY",
    "api_currency": "USD",
    "exchange_rate": 7.197,
}


def terms(**fields: Any) -> Terms:
    return Terms(**PUBLISHED | fields)


def test_the_published_case() -> None:
    """5,000 images a day for three years; the source rounds, hence the tolerances."""
    cost = cost_of(5.0, terms())
    assert cost.images == 5_475_000
    assert cost.electricity == pytest.approx(3_150, abs=5)
    assert cost.local_total == pytest.approx(26_150, abs=5)
    assert cost.api_per_year_there == pytest.approx(73_000)
    assert cost.api_total == pytest.approx(1_576_200, abs=100)
    assert cost.api_per_image == pytest.approx(0.04 * 7.197)
    assert cost.local_per_image == pytest.approx(26_153.6 / 5_475_000)
    assert cost.warnings == []


def test_break_even_is_the_first_image_from_which_the_machine_is_cheaper() -> None:
    cost = cost_of(5.0, terms())
    n = cost.break_even_images
    assert n is not None

    def local(n_images: int) -> float:
        return 23_000 + n_images * cost.electricity / cost.images

    assert local(n) <= n * cost.api_per_image
    assert local(n - 1) > (n - 1) * cost.api_per_image
    assert cost.break_even_days == math.ceil(n / 5_000) == 17


def test_a_service_cheaper_than_electricity_is_never_overtaken() -> None:
    cost = cost_of(5.0, terms(api_price=0.00001))
    assert (cost.break_even_images, cost.break_even_days) == (None, None)
    assert "break-even   never: " in cost_text(cost_document({"": 5.0}, terms(api_price=0.00001)))


def test_without_hours_the_machine_is_powered_while_it_paints() -> None:
    cost = cost_of(3.6, terms(hours_per_day=None))
    assert cost.hours_powered == cost.hours_needed == pytest.approx(5.0)
    assert cost.electricity_per_year == pytest.approx(0.45 * 5 * 365 * 0.8)
    assert cost.images_per_day == 5_000
    assert cost.warnings == []


def test_a_day_that_is_too_short_is_told_and_only_what_is_made_is_counted() -> None:
    cost = cost_of(40.0, terms(hours_per_day=None))
    assert cost.hours_powered == 24
    assert cost.images_per_day == pytest.approx(2_160)
    assert cost.images == pytest.approx(2_160 * 365 * 3)
    assert cost.api_total_there == pytest.approx(cost.images * 0.04)
    (warning,) = cost.warnings
    assert warning.startswith("5,000 images a day need 55.6 h, and a day has 24: one such machine ")
    assert "makes 2,160" in warning


def test_too_few_powered_hours_are_told() -> None:
    cost = cost_of(7.2, terms())
    assert cost.images_per_day == pytest.approx(4_000)
    (warning,) = cost.warnings
    assert "need 10.0 h, and it is powered for 8 (--hours-per-day)" in warning


def test_exactly_enough_hours_are_enough() -> None:
    assert cost_of(5.76, terms()).warnings == []
    assert cost_of(86400 / 5000, terms(hours_per_day=None)).warnings == []


def test_a_break_even_beyond_the_years_is_told() -> None:
    cost = cost_of(5.0, terms(images_per_day=50))
    (warning,) = cost.warnings
    assert warning == "break-even comes after the 3 years that are counted"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"watts": -1}, "watts is -1; it must be 0 or more"),
        ({"api_price": math.nan}, "api_price is nan"),
        ({"hardware_price": math.inf}, "hardware_price is inf"),
        ({"images_per_day": 0}, "images_per_day is 0; it must be more than 0"),
        ({"years": 0}, "years is 0; it must be more than 0"),
        ({"hours_per_day": 25}, "hours_per_day is 25; a day has 24"),
        ({"exchange_rate": None}, "prices are in CNY and USD; give --exchange-rate, the CNY for"),
        ({"api_currency": ""}, "exchange_rate is 7.197, but all prices are in CNY"),
        ({"exchange_rate": 0}, "exchange_rate is 0; it must be more than 0"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        terms(**fields)


def test_seconds_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="seconds_per_image is 0; it must be more than 0"):
        cost_of(0.0, terms())


def test_one_currency_needs_no_rate() -> None:
    cost = cost_of(5.0, terms(api_currency="", exchange_rate=None))
    assert cost.api_per_image == 0.04
    text = cost_text(cost_document({"": 5.0}, terms(api_currency="", exchange_rate=None)))
    assert "\nAPI          CNY 219,000.00\n" in text


def test_the_text_has_every_figure() -> None:
    text = cost_text(cost_document({"512x512": 5.0, "1024x1024": 5.5}, terms()))
    first, second = text.split("\n\n")
    assert first.splitlines() == [
        "512x512: 5.00 s an image, 5,000 a day for 3 years: 5,475,000 images",
        "powered      8.00 h a day",
        "electricity  CNY 1,051.20 a year",
        "local        CNY 26,153.60 (hardware 23,000.00, electricity 3,153.60)",
        "API          CNY 1,576,143.00 (USD 219,000.00 at 7.197 CNY/USD)",
        "per image    local CNY 0.004777, API CNY 0.2879",
        "break-even   80,055 images, 17 days",
    ]
    assert second.startswith("1024x1024: 5.50 s an image")


def test_the_document_has_its_terms_and_costs() -> None:
    document = cost_document({"": 5.0}, terms())
    assert document["schema"] == SCHEMA
    assert document["terms"]["exchange_rate"] == 7.197
    assert document["costs"][0]["local_total"] == pytest.approx(26_153.6)


def test_seconds_are_those_of_warm_pictures_that_did_not_fail() -> None:
    row = {"width": 64, "height": 32, "failure": None, "warm": {"total_s": {"median": 2}}}
    failed = {"width": 96, "height": 96, "failure": "no memory"}
    assert seconds_in({"sizes": [row, failed]}) == {"64x32": 2.0}
