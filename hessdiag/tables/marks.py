"""A quantity in print: its kind and as many digits as its certificate carries.

Nothing is rounded to the flattering side: a lower bound and the low end of an interval are
rounded down, an upper bound and the high end up, and an exact value shows no digit that its
rounding bound leaves open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal

from hessdiag.quantity import Quantity
from hessdiag.tables.lines import TIED

Show = Callable[[float, str], str]
"""A number in print, rounded in one of decimal's directions."""

MEANINGS = {
    "=": "exact",
    "≥": "lower bound",
    "≤": "upper bound",
    "[]": "interval (one number: narrower than its digits)",
    "~": "estimate",
    "?": "unresolved",
    "0": "zero Hessian",
    "–": "does not exist",
}
"""Every kind of mark, for legends."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What stands in a cell: ``lead`` before the number, ``tail`` behind it."""

    kind: str
    lead: str = ""
    text: str = ""
    tail: str = ""

    def __str__(self) -> str:
        gap = " " if self.lead and self.lead != "[" else ""
        return f"{self.lead}{gap}{self.text}{self.tail}"


def meanings(marks: Iterable[Mark]) -> list[str]:
    """A line of a legend for each kind among ``marks``."""
    kinds = {mark.kind for mark in marks}
    return [f"{kind}{TIED}{meaning}" for kind, meaning in MEANINGS.items() if kind in kinds]


def scientific(digits: int) -> Show:
    """Numbers with ``digits`` significant digits: ``-1.23e-04``, or ``0``."""

    def show(number: float, rounding: str) -> str:
        if number == 0:
            return "0"
        rounded = Context(prec=digits, rounding=rounding).create_decimal(_decimal(number))
        return f"{float(rounded):.{digits - 1}e}"

    return show


def compact(digits: int) -> Show:
    """As :func:`scientific` without padding: ``-1.23e-4``."""
    return _short(scientific(digits))


def whole(number: float, rounding: str) -> str:
    """A count."""
    return str(int(_decimal(number).to_integral_value(rounding)))


def percent(number: float, rounding: str) -> str:
    """A share of one; what is not nothing never reads 0 %, what is not all never 100 %."""
    share = _decimal(number) * 100
    tenths = share.quantize(Decimal("0.1"), rounding)
    if share > 0 and tenths == 0:
        return "<0.1%"
    if share < 100 and tenths == 100:
        return ">99.9%"
    return f"{tenths}%" if share else "0%"


def times(digits: int) -> Show:
    """Ratios with ``digits`` significant digits: ``×1.79``, or ``×1.79e+06`` far from one."""

    def show(number: float, rounding: str) -> str:
        return f"×{near_one(digits)(number, rounding)}"

    return show


def signed(digits: int) -> Show:
    """Differences with ``digits`` significant digits and their sign: ``+1.20e-03``."""

    def show(number: float, rounding: str) -> str:
        return ("+" if number > 0 else "") + scientific(digits)(number, rounding)

    return show


def signed_whole(number: float, rounding: str) -> str:
    """A difference of counts: ``+3``."""
    return ("+" if number > 0 else "") + whole(number, rounding)


def signed_percent(number: float, rounding: str) -> str:
    """A difference of shares of one: ``-1.2%``."""
    if number >= 0:
        return ("+" if number else "") + percent(number, rounding)
    turned = {ROUND_FLOOR: ROUND_CEILING, ROUND_CEILING: ROUND_FLOOR}
    return f"-{percent(-number, turned.get(rounding, rounding))}"


def near_one(digits: int) -> Show:
    """Numbers with ``digits`` significant digits: ``45.5``, or ``4.59e+08`` far from one."""

    def show(number: float, rounding: str) -> str:
        rounded = Context(prec=digits, rounding=rounding).create_decimal(_decimal(number))
        if not number or not -3 <= rounded.adjusted() <= 3:
            return scientific(digits)(number, rounding)
        return f"{rounded:.{max(digits - 1 - rounded.adjusted(), 0)}f}"

    return show


def certified(
    quantity: Quantity, digits: int = 3, form: Callable[[int], Show] = scientific
) -> Mark:
    """``quantity`` in scientific notation (or another ``form``), marked with its kind.

    An interval that is narrower than the last digit is one number in brackets. An exact value
    without a certain digit is 0 where its rounding bound reaches across zero, else its interval.
    """
    certain = _certain_digits(quantity, digits)
    if quantity.value is not None and quantity.status == "exact":
        if certain:
            return Mark("=", "=", form(certain)(quantity.value, ROUND_HALF_EVEN))
        if _has_no_sign(quantity):
            return Mark("=", "=", "0")
        quantity = replace(quantity, status="interval")
    if quantity.value is not None and quantity.status == "interval" and certain == digits:
        return Mark("[]", "[", form(digits)(quantity.value, ROUND_HALF_EVEN), "]")
    return marked(quantity, form(digits), _short(form(max(digits - 1, 1))))


def marked(quantity: Quantity, show: Show, show_end: Show | None = None) -> Mark:
    """``quantity`` as ``show`` prints it, the ends of an interval as ``show_end`` does.

    An exact value stands without a mark, for columns of counts.
    """
    value, low, high = quantity.value, quantity.low, quantity.high
    match quantity.status:
        case "exact" if value is not None:
            return Mark("=", "", show(value, ROUND_HALF_EVEN))
        case "lower-bound" if low is not None:
            return Mark("≥", "≥", show(low, ROUND_FLOOR))
        case "upper-bound" if high is not None:
            return Mark("≤", "≤", show(high, ROUND_CEILING))
        case "estimate" if value is not None:
            return Mark("~", "~", show(value, ROUND_HALF_EVEN))
        case "interval" if low is not None and high is not None:
            end = show_end or show
            ends = end(low, ROUND_FLOOR), end(high, ROUND_CEILING)
            return Mark("[]", "[", ends[0] if ends[0] == ends[1] else ", ".join(ends), "]")
        case "zero":
            return Mark("0", "", "0")
        case None:
            return Mark("–", "", "–")
    return Mark("?", "", "?")


def _has_no_sign(quantity: Quantity) -> bool:
    """Whether rounding leaves both signs open."""
    return (
        quantity.low is not None and quantity.high is not None and quantity.low < 0 < quantity.high
    )


def _decimal(number: float) -> Decimal:
    """The decimal that Python prints for ``number``: 0.3 rounded down is 0.3, not 0.299."""
    return Decimal(repr(float(number)))


def _short(padded: Show) -> Show:
    """Without the padding of the exponent."""

    def show(number: float, rounding: str) -> str:
        mantissa, _, exponent = padded(number, rounding).partition("e")
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa

    return show


def _certain_digits(quantity: Quantity, digits: int) -> int:
    """How many digits, at most ``digits``, have a unit no less than the width of the interval."""
    value, low, high = quantity.value, quantity.low, quantity.high
    if value is None or low is None or high is None:
        return 0
    width = Decimal(high) - Decimal(low)
    if value == 0 or width == 0:
        return digits if width == 0 else 0
    leading = Decimal(value).adjusted()
    fits = (d for d in range(digits, 0, -1) if width <= Decimal(10) ** (leading - d + 1))
    return next(fits, 0)
