"""Numbers out of answers in words: what a solution of a mathematical problem comes to, and whether two come to the
same."""

from __future__ import annotations

import re
from fractions import Fraction

_MINUS = "\N{MINUS SIGN}"
_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:[eE][-+]?\d+)?"
_DIGITS = re.compile(rf"(?<![\w.])[$€£]?\s?({_NUMBER})(?:\s*/\s*({_NUMBER}))?(?:\s*(%|\\%))?")
_FRACTION = re.compile(r"([-+]?)\s*\\[dt]?frac\s*(?:\{([^{}]+)\}\s*\{([^{}]+)\}|(\d)\s*(\d))")
#: Where an answer says that it gives its result: GSM8K's mark, and the phrases of instruction-tuned models.
_MARK = re.compile(r"####|answer(?:\s*(?:is|:|=))+\s*", re.IGNORECASE)
#: After a number: nothing, or words that say what it counts.
_UNIT = re.compile(r"[.,;!?*$)]*(?:\s+[^\W\d_][^\\^=+*/{}]*)?[.,;!?*$)]*")
_FORMULA = re.compile(r"[\\^(){}\[\]=+*/:]|\d\s*[a-zA-Z]\b")
_SPACES = re.compile(r"\\[,;!: ]|\\(?:left|right)(?![a-zA-Z])|\s+")


def result_of(text: str) -> str | None:
    """What an answer comes to: in its last `\\boxed{...}`; after its last mark (`####`, "the answer is"); its last
    number. None where there is none of these."""
    text = text.replace(_MINUS, "-")
    if (boxed := _last_boxed(text)) is not None:
        return boxed.strip() or None
    marks = list(_MARK.finditer(text))
    if marks:
        line = text[marks[-1].end() :].strip().splitlines()
        return _result_in(line[0]) if line else None
    return number_in(text, first=False)


def _result_in(line: str) -> str | None:
    """What a line gives: the number that it begins with, where nothing but a unit follows; its only number, where it
    holds no formula; else the line itself, so that 2\\sqrt{3} is not taken for 2."""
    bare = line.strip(" *$")
    begins = _FRACTION.match(bare) or _DIGITS.match(bare)
    if begins is not None and re.search(r"\d", begins.group(0)) and _UNIT.fullmatch(bare[begins.end() :]):
        return begins.group(0).strip()
    numbers = [m.group(0).strip() for m in _DIGITS.finditer(bare) if re.search(r"\d", m.group(0))]
    if len(numbers) == 1 and not _FORMULA.search(bare):
        return numbers[0]
    return bare.rstrip(".") or None


def _last_boxed(text: str) -> str | None:
    """The inside of the last `\\boxed{...}`, braces balanced; None where it is not closed, or not there."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : i]
    return None


def number_in(text: str, first: bool) -> str | None:
    """The first or the last number of a text, as it is written there, its unit left out."""
    found = [m.group(0).strip() for m in _FRACTION.finditer(text)] if "frac" in text else []
    found = found or [m.group(0).strip() for m in _DIGITS.finditer(text) if re.search(r"\d", m.group(0))]
    return (found[0] if first else found[-1]) if found else None


def as_number(text: str) -> Fraction | None:
    """Its value where it is a number alone: signs, thousands, decimals, exponents, fractions, LaTeX's too, per cent as
    it is written (50% is 50); None for everything else."""
    plain = (
        _SPACES.sub("", text.replace(_MINUS, "-")).lstrip("$€£").rstrip("$.").replace("\\$", "").replace("^\\circ", "")
    )
    if match := _FRACTION.fullmatch(plain):
        above, below = as_number(match.group(2) or match.group(4)), as_number(match.group(3) or match.group(5))
        if above is None or not below:
            return None
        return -above / below if match.group(1) == "-" else above / below
    match = _DIGITS.fullmatch(plain)
    if match is None or not re.search(r"\d", plain):
        return None
    above, below = _value(match.group(1)), _value(match.group(2) or "1")
    return None if above is None or not below else above / below


def _value(digits: str) -> Fraction | None:
    """Of an integer or a decimal; None beyond what anybody writes (an exponent may name a number that fills the
    memory)."""
    plain = digits.replace(",", "")
    exponent = re.search(r"[eE]([-+]?\d+)$", plain)
    if not re.search(r"\d", plain) or len(plain) > 400 or (exponent and abs(int(exponent.group(1))) > 400):
        return None
    return Fraction(plain)


def same_result(one: str | None, other: str | None) -> bool:
    """Whether two results are the same number, or where they are no numbers the same text but for spaces."""
    if one is None or other is None:
        return False
    a, b = as_number(one), as_number(other)
    if a is not None and b is not None:
        return abs(a - b) <= Fraction(1, 10**6) * max(Fraction(1), abs(b))
    return a is None and b is None and _SPACES.sub("", one).strip("$.") == _SPACES.sub("", other).strip("$.")
