"""What a picture costs: a machine of one's own against a service that is paid per picture.

    electricity a year = watts / 1000 * powered hours a day * 365 * price per kWh
    local              = hardware + electricity a year * years
    API                = images a day * 365 * years * price per image * exchange rate
    break-even         = hardware / (price per image * exchange rate - electricity per image)

The machine draws `watts` in every hour that it is powered. Not in it: work, rent, interest, repairs
and what the hardware is worth afterwards. Prices are given, never looked up.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from zquant.units import format_seconds

__all__ = ["SCHEMA", "Cost", "Terms", "cost_document", "cost_of", "cost_text", "seconds_in"]

SCHEMA = "zquant-bench-cost-1"
DAYS = 365
DAY_HOURS = 24
ROUNDING = 1e-9  # of hours that were computed from seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Prices and use.

    Attributes:
        hardware_price: of the machine.
        watts: it draws while it is powered.
        price_per_kwh: of electricity.
        images_per_day: wanted, every day.
        api_price: of one image, in `api_currency`.
        years: the machine is used.
        hours_per_day: it is powered; None is as long as the images take.
        currency: of the local prices.
        api_currency: of the service; empty is `currency`.
        exchange_rate: units of `currency` for one of `api_currency`; needed where they differ.

    Raises:
        ValueError: a number is out of range, or an exchange rate is missing or pointless.
    """

    hardware_price: float
    watts: float
    price_per_kwh: float
    images_per_day: float
    api_price: float
    years: float = 3.0
    hours_per_day: float | None = None
    currency: str = "USD"
    api_currency: str = ""
    exchange_rate: float | None = None

    def __post_init__(self) -> None:
        for name in ("hardware_price", "watts", "price_per_kwh", "api_price"):
            _check(name, getattr(self, name), may_be_zero=True)
        for name in ("images_per_day", "years", "hours_per_day", "exchange_rate"):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), may_be_zero=False)
        if self.hours_per_day is not None and self.hours_per_day > DAY_HOURS:
            raise ValueError(f"hours_per_day is {self.hours_per_day:g}; a day has {DAY_HOURS}")
        differ = self.api_currency not in ("", self.currency)
        if differ and self.exchange_rate is None:
            raise ValueError(
                f"prices are in {self.currency} and {self.api_currency}; give --exchange-rate, the "
                f"{self.currency} for one {self.api_currency}"
            )
        if not differ and self.exchange_rate not in (None, 1):
            raise ValueError(
                f"exchange_rate is {self.exchange_rate:g}, but all prices are in {self.currency}; "
                f"name the other currency with --api-currency"
            )

    @property
    def api_price_here(self) -> float:
        """Of one image, in `currency`."""
        return self.api_price * (self.exchange_rate or 1.0)


def _check(name: str, value: float, *, may_be_zero: bool) -> None:
    if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
        expected = "0 or more" if may_be_zero else "more than 0"
        raise ValueError(f"{name} is {value:g}; it must be {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What follows, in `currency` unless the name says otherwise.

    Attributes:
        seconds_per_image: measured.
        hours_needed: a day, for all images that are wanted.
        hours_powered: a day.
        images_per_day: that are made.
        images: made in all years.
        electricity_per_year: for the powered hours.
        electricity: in all years.
        local_total: hardware and electricity.
        local_per_image: of those that are made.
        api_per_year_there: of the same images, in `api_currency`.
        api_total_there: likewise, in all years.
        api_total: likewise, in `currency`.
        api_per_image: of the service.
        break_even_images: from which on the machine is cheaper; None is never.
        break_even_days: until they are made.
        warnings: what speaks against these figures.
    """

    seconds_per_image: float
    hours_needed: float
    hours_powered: float
    images_per_day: float
    images: float
    electricity_per_year: float
    electricity: float
    local_total: float
    local_per_image: float
    api_per_year_there: float
    api_total_there: float
    api_total: float
    api_per_image: float
    break_even_images: int | None
    break_even_days: int | None
    warnings: list[str]


def cost_of(seconds_per_image: float, terms: Terms) -> Cost:
    """What images of so many seconds cost; the service is paid for as many as the machine makes.

    Raises:
        ValueError: the seconds are not more than 0.
    """
    _check("seconds_per_image", seconds_per_image, may_be_zero=False)
    needed = terms.images_per_day * seconds_per_image / 3600
    powered = min(needed, DAY_HOURS) if terms.hours_per_day is None else terms.hours_per_day
    fits = needed <= powered * (1 + ROUNDING)
    made = terms.images_per_day if fits else powered * 3600 / seconds_per_image
    images = made * DAYS * terms.years
    electricity_per_year = terms.watts / 1000 * powered * DAYS * terms.price_per_kwh
    electricity = electricity_per_year * terms.years
    total = terms.hardware_price + electricity
    saved = terms.api_price_here - electricity / images
    break_even = math.ceil(terms.hardware_price / saved) if saved > 0 else None
    days = None if break_even is None else math.ceil(break_even / made)
    return Cost(
        seconds_per_image=seconds_per_image,
        hours_needed=needed,
        hours_powered=powered,
        images_per_day=made,
        images=images,
        electricity_per_year=electricity_per_year,
        electricity=electricity,
        local_total=total,
        local_per_image=total / images,
        api_per_year_there=made * DAYS * terms.api_price,
        api_total_there=images * terms.api_price,
        api_total=images * terms.api_price_here,
        api_per_image=terms.api_price_here,
        break_even_images=break_even,
        break_even_days=days,
        warnings=_warnings(terms, needed, powered, None if fits else made, days),
    )


def _warnings(
    terms: Terms, needed: float, powered: float, made: float | None, days: int | None
) -> list[str]:
    """`made` images a day are fewer than wanted; None: they are not."""
    found = []
    if made is not None:
        if needed > DAY_HOURS * (1 + ROUNDING):
            limit = f"a day has {DAY_HOURS}"
        else:
            limit = f"it is powered for {powered:g} (--hours-per-day)"
        found.append(
            f"{terms.images_per_day:,.0f} images a day need {needed:.1f} h, and {limit}: one such "
            f"machine makes {made:,.0f}, and all figures are for those"
        )
    if days is not None and days > terms.years * DAYS:
        found.append(f"break-even comes after the {terms.years:g} years that are counted")
    return found


def seconds_in(document: Mapping[str, Any]) -> dict[str, float]:
    """Size -> seconds of a warm picture, in all its phases, of a valid document of `bench`."""
    return {
        f"{row['width']}x{row['height']}": float(row["warm"]["total_s"]["median"])
        for row in document["sizes"]
        if row["failure"] is None
    }


def cost_document(seconds: Mapping[str, float], terms: Terms) -> dict[str, Any]:
    """The costs by size, as JSON values; one size without a name is what a user gave."""
    return {
        "schema": SCHEMA,
        "terms": asdict(terms),
        "costs": [{"size": size} | asdict(cost_of(s, terms)) for size, s in seconds.items()],
    }


def cost_text(document: Mapping[str, Any]) -> str:
    """What `cost_document` gave, as aligned text."""
    terms = document["terms"]
    blocks = []
    for cost in document["costs"]:
        size = f"{cost['size']}: " if cost["size"] else ""
        title = (
            f"{size}{format_seconds(cost['seconds_per_image'])} an image, "
            f"{cost['images_per_day']:,.0f} a day for {terms['years']:g} years: "
            f"{cost['images']:,.0f} images"
        )
        rows = _rows(cost, terms)
        width = max(len(name) for name, _ in rows)
        lines = [f"{name.ljust(width)}  {text}" for name, text in rows]
        lines += [f"warning: {warning}" for warning in cost["warnings"]]
        blocks.append("\n".join([title, *lines]))
    return "\n\n".join(blocks)


def _rows(cost: Mapping[str, Any], terms: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    here, there = terms["currency"], terms["api_currency"] or terms["currency"]
    api = f"{here} {cost['api_total']:,.2f}"
    if there != here:
        total, rate = cost["api_total_there"], terms["exchange_rate"]
        api += f" ({there} {total:,.2f} at {rate:g} {here}/{there})"
    images, days = cost["break_even_images"], cost["break_even_days"]
    never = "never: a picture of the service costs no more than the electricity of one"
    return [
        ("powered", f"{cost['hours_powered']:.2f} h a day"),
        ("electricity", f"{here} {cost['electricity_per_year']:,.2f} a year"),
        (
            "local",
            f"{here} {cost['local_total']:,.2f} (hardware {terms['hardware_price']:,.2f}, "
            f"electricity {cost['electricity']:,.2f})",
        ),
        ("API", api),
        (
            "per image",
            f"local {here} {cost['local_per_image']:.4g}, API {here} {cost['api_per_image']:.4g}",
        ),
        ("break-even", never if images is None else f"{images:,} images, {days:,} days"),
    ]
