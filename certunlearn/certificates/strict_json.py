"""The JSON of a certificate's file, read strictly: no name twice, no number beyond float64."""

import json
import math
from typing import Any

from certunlearn.certificates import record_format


def parse(content: bytes) -> Any:
    """The JSON in `content`, strictly: no duplicate names, no constants beside JSON's own.

    Raises:
      ValueError: saying what is wrong, in one printable line.
    """
    if len(content) > record_format.MOST_BYTES:
        raise ValueError(
            f"it has more than {record_format.MOST_BYTES} bytes, which no certificate has"
        )
    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_int=_whole,
            parse_float=_number,
        )
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"not valid JSON ({record_format.printable(error)})") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a field twice")
    return found


def _whole(text: str) -> int:
    if len(text) > 31:
        raise ValueError("a whole number has more than 30 digits")
    return int(text)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number is beyond float64")
    return number


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number that a certificate may hold")
