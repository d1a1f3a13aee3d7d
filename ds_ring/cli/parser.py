"""The parser of every command: one line for a mistake, and numbers with their limits."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn

from ds_ring.config.sections import LEAST_TEMPERATURE, MOST
from ds_ring.errors import ConfigError
from ds_ring.process.outcome import NO_STDOUT
from ds_ring.utils.streams import print_result

LARGEST_SEED = (1 << 64) - 1


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for a mistake. Options are not abbreviated: a misspelt one is no other."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )  # fmt: skip

    def print_help(self, file: Any = None) -> None:
        try:
            print_result(self.format_help().rstrip())
        except OSError:
            self.exit(NO_STDOUT)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the options")


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """The type of an option that takes a whole number from ``least`` to ``most``."""

    def parsed(text: str) -> int:
        digits = text.strip().removeprefix("-")
        value = int(text) if digits.isascii() and digits.isdecimal() and len(digits) < 30 else None
        if value is None or not least <= value <= most:
            of_digits = digits == text.strip() and digits.isascii() and digits.isdecimal()
            too_large = of_digits and (value is None or value > most)
            limits = f"from {least} to {most}" if too_large or most != MOST else f"of at least {least}"
            raise argparse.ArgumentTypeError(f"{text} must be a whole number {limits}")
        return value

    return parsed


def number(least: float = 0.0, most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """The type of an option that takes a finite number from ``least``, or above it, to ``most``."""

    def parsed(text: str) -> float:
        try:
            value = float(text) if "_" not in text else math.nan
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (least < value if above else least <= value) and value <= most):
            limits = f"{'above' if above else 'from'} {least:g}" + ("" if most == math.inf else f", at most {most:g}")
            raise argparse.ArgumentTypeError(f"{text} must be a number {limits}")
        return value

    return parsed


def temperature(text: str) -> float:
    """The type of ``--temperature``: 0, or a number that logits can be divided by."""
    value = number()(text)
    if 0 < value < LEAST_TEMPERATURE:
        limits = f"must be 0, which takes the likeliest token, or at least {LEAST_TEMPERATURE:g}"
        raise argparse.ArgumentTypeError(f"{text} {limits}")
    return value
