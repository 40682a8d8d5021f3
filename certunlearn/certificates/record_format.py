"""The form of a certificate's record: what each field may hold, whoever wrote the file.

Nothing here looks at what a certificate claims. A record that passes can be printed as it is: every
text in it is one line of printable ASCII, and every text that a report shows is one of a known few
or of a strict form. The bounds on sizes are for whoever verifies: they keep the work of deriving a
claim again within seconds. `certify` refuses to issue what does not pass.
"""

import datetime
import json
import math
import re
from collections.abc import Callable
from typing import Any

from certunlearn import mechanisms
from certunlearn._numerics import checks, random_keys

SCHEMA = "certunlearn.certificate/4"
# Format 3 had no exact mechanisms: every claim had noise, steps and a delta above 0.
THIRD_SCHEMA = "certunlearn.certificate/3"
# Format 2 had no `separations`: it was for the package's mechanisms only.
SECOND_SCHEMA = "certunlearn.certificate/2"
# Format 1 had no `evidence`, and its assumptions left out what the steps after the noise may see.
FIRST_SCHEMA = "certunlearn.certificate/1"
_SCHEMAS = (SCHEMA, THIRD_SCHEMA, SECOND_SCHEMA, FIRST_SCHEMA)
# Mechanisms that the package has had since format 4. Before, a user's class may have had the name.
_NEW_MECHANISMS = ("PerturbedMinimizer", "Retraining", "ExactHead")

# Largest certificate file, in bytes. A plan of 10,000 steps with three schedules has 800,000.
MOST_BYTES = 1_000_000
# Of which all but schedules and frozen paths take less.
_ROOM = 20_000
# Most steps of a plan. Deriving a claim takes a second for so many.
MOST_STEPS = 1_000_000
# Parameters in a model, and anything else that is counted.
MOST_COUNTED = 10**15
# Every number is 0 or between these in magnitude.
LEAST_NUMBER, MOST_NUMBER = 1e-300, 1e60
# Levels of lists and objects in each other; a certificate has three.
MOST_DEPTH = 8
LONGEST_TEXT = 2_000

COUNTED = "optimizer state"
SAID = "word of the issuer"
EVIDENCE = (COUNTED, SAID)
KEY_SOURCES = (random_keys.FROM_SYSTEM, random_keys.FROM_CALLER, "not said")
ACCOUNTANTS = ("interpolation", "closed-form", "coupling", "product", "dp-accounting", "exact")
_NOISY_ACCOUNTANTS = ACCOUNTANTS[:-1]

_DTYPES = ("float32", "float64")
_PACKAGES = ("certunlearn", "jax", "jaxlib", "numpy", "optax", "python", "scipy")
_VERSION = re.compile(r"[0-9A-Za-z.+!_-]{1,64}")
_CLASS_NAME = re.compile(r"[A-Za-z_][0-9A-Za-z_]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
# UTC, to the second, as `datetime.isoformat` writes it.
_CREATED = re.compile(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\+00:00")


def problems(record: Any) -> list[str]:
    """What is wrong with a record's form: the first problem found, or nothing."""
    for check in (_fields_problem, _value_problem, _text_problem, _size_problem):
        found = check(record)
        if found is not None:
            return [found]
    return []


def plan_problem(
    mechanism: dict[str, Any],
    separations: dict[str, Any] | None,
    noise_scale: checks.PerStep | list[float],
    frozen: list[str],
) -> str | None:
    """Why no run of such a plan can have a certificate, whatever comes of it, or None."""
    plan = {
        "schema": SCHEMA,
        "mechanism": mechanism,
        "separations": separations,
        "noise_scale": noise_scale,
        "steps_run": 1,
    }
    rules = _rules(plan)
    for name in ("mechanism", "separations", "noise_scale"):
        rule, right = rules[name]
        if not rule(plan[name]):
            return f"{name} must be {right}, got {printable(plan[name])}"
    problem = _text_problem(plan | {"coverage": frozen}) or _size_problem(plan)
    length = len(json.dumps(plan | {"coverage": frozen}, indent=2))
    if problem is None and length > MOST_BYTES - _ROOM:
        problem = (
            f"a certificate has at most {MOST_BYTES} bytes, and schedules and frozen paths of this "
            f"plan take {length}"
        )
    return problem


def printable(value: Any, most: int = 200) -> str:
    """A value as text for a message: one line of printable ASCII, shortened."""
    text = str(value) if isinstance(value, str | BaseException) else _represented(value)
    text = "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else text[: most - 3] + "..."


def _represented(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a whole number of more than 30 digits"
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return repr(value)


def _fields_problem(record: Any) -> str | None:
    if not isinstance(record, dict):
        return "not a JSON object"
    schema = record.get("schema")
    if schema not in _SCHEMAS:
        return f"schema must be {SCHEMA!r}, got {printable(schema)}"
    expected = set(_RULES)
    missing = expected - set(record) - {"epsilon_lower_bound", "sums_digest"}
    if schema in (SECOND_SCHEMA, FIRST_SCHEMA):
        missing -= {"separations"}
    if schema == FIRST_SCHEMA:
        missing -= {"evidence"}
    unknown = set(record) - expected
    if missing:
        return f"missing fields: {', '.join(sorted(missing))}"
    if unknown:
        return f"unknown fields: {printable(', '.join(map(str, sorted(unknown, key=str))))}"
    return None


def _value_problem(record: dict[str, Any]) -> str | None:
    for name, (rule, right) in _rules(record).items():
        value = record.get(name)
        if record["schema"] == FIRST_SCHEMA and name == "evidence" and value is None:
            continue
        if not rule(value):
            return f"{name} must be {right}, got {printable(value)}"
    stated = record.get("separations") is not None
    if stated and record["schema"] in (SECOND_SCHEMA, FIRST_SCHEMA):
        return f"separations must be None in {record['schema']}"
    name = record["mechanism"]["name"]
    if stated == (_own_mechanism(record) is not None):
        needs = "must be None for" if stated else "are missing for"
        return f"separations {needs} the mechanism {printable(name)}"
    return None


def _own_mechanism(record: dict[str, Any]) -> type[mechanisms.Mechanism] | None:
    """The package's mechanism that a record names, as its format knows it; None for others."""
    stated = record.get("mechanism")
    name = stated.get("name") if isinstance(stated, dict) else None
    if not isinstance(name, str) or (record["schema"] != SCHEMA and name in _NEW_MECHANISMS):
        return None
    return mechanisms.MECHANISMS.get(name)


def _rules(record: dict[str, Any]) -> dict[str, tuple[Callable[[Any], bool], str]]:
    """The rules for a record's fields: exact mechanisms claim 0, and no other may."""
    own = _own_mechanism(record)
    if own is None or not own.exact:
        return _RULES
    return _RULES | _EXACT_RULES | ({"sums_digest": _DIGEST_RULE} if own.of_sums else {})


def _text_problem(record: dict[str, Any]) -> str | None:
    """The first text or number, at any depth, that no honest certificate holds."""
    stack = [(name, value, 1) for name, value in record.items()]
    while stack:
        name, value, depth = stack.pop()
        if depth > MOST_DEPTH:
            return f"{name} is nested too deeply"
        if isinstance(value, str):
            # Paths of frozen leaves may be in any script: nothing shows them.
            right = "text" if name == "coverage" else "ASCII"
            if len(value) > LONGEST_TEXT or not (
                value.isprintable() and (value.isascii() or name == "coverage")
            ):
                return (
                    f"{name} must hold lines of printable {right}, of at most {LONGEST_TEXT} "
                    f"characters, got {printable(value)}"
                )
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int | float):
            if not _finite(value) or (value != 0 and not LEAST_NUMBER <= abs(value) <= MOST_NUMBER):
                if name in ("delta", "epsilon_lower_bound", "epsilon", "mu", "total_variation"):
                    continue  # results may be as small as they are
                return (
                    f"{name} must hold numbers that are 0 or between {LEAST_NUMBER:g} and "
                    f"{MOST_NUMBER:g}, got {printable(value)}"
                )
        elif isinstance(value, list):
            stack += [(name, each, depth + 1) for each in value]
        elif isinstance(value, dict):
            stack += [(name, each, depth + 1) for each in value]
            stack += [(name, each, depth + 1) for each in value.values()]
        else:
            return f"{name} must hold JSON values, got {type(value).__name__}"
    return None


def _size_problem(record: dict[str, Any]) -> str | None:
    """Whether numbers of steps agree, and are not beyond what is derived in seconds."""
    stated, scale = record["mechanism"], record["noise_scale"]
    own = _own_mechanism(record)
    if own is not None and own.exact:  # no steps; a head's lists are as long as it has classes
        return None
    if record.get("separations") is not None:
        stated = record["separations"]
    planned = stated.get("steps", 1)
    if not _counts(1, MOST_STEPS)(planned):
        return f"mechanism must have from 1 to {MOST_STEPS} steps, got {printable(planned)}"
    if record["steps_run"] > planned:
        return f"steps_run must be at most {planned}, got {record['steps_run']}"
    for name, value in (("noise_scale", scale), *stated.items()):
        if isinstance(value, list) and name != "assumptions" and len(value) != planned:
            return f"{printable(name)} must have {planned} numbers, got {len(value)}"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _finite(value: Any) -> bool:
    """Whether it is a finite number; no bool is one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _counts(least: int, most: int = MOST_COUNTED) -> Callable[[Any], bool]:
    def rule(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return rule


def _or_none(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


def _one_of(allowed: tuple[str, ...]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in allowed


def _from(least: float, most: float = math.inf) -> Callable[[Any], bool]:
    return lambda value: _finite(value) and least <= value <= most


def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_noise(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return bool(numbers) and all(_finite(number) and number > 0 for number in numbers)


def _is_mechanism(value: Any) -> bool:
    if not isinstance(value, dict) or not _matches(_CLASS_NAME)(value.get("name")):
        return False
    return all(_is_field(each) for each in value.values())


def _is_separations(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_field(each) for each in value.values())


def _is_field(value: Any) -> bool:
    """What a mechanism's field may be: a short text, a bool, None, a number, or several of them."""
    if isinstance(value, list):
        return all(each is None or isinstance(each, str | bool) or _finite(each) for each in value)
    return value is None or isinstance(value, str | bool) or _finite(value)


def _is_coverage(value: Any) -> bool:
    names = {"parameters", "leaves", "dtypes", "frozen", "frozen_parameters"}
    if not isinstance(value, dict) or set(value) != names:
        return False
    dtypes, frozen = value["dtypes"], value["frozen"]
    return (
        _counts(1)(value["parameters"])
        and _counts(1)(value["leaves"])
        and _counts(0)(value["frozen_parameters"])
        and isinstance(dtypes, list)
        and all(map(_one_of(_DTYPES), dtypes))
        and isinstance(frozen, list)
        and all(map(_is_text, frozen))
        and len(set(frozen)) == len(frozen)
    )


def _is_assumptions(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_text, value))


def _is_versions(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == set(_PACKAGES)
        and all(map(_matches(_VERSION), value.values()))
    )


def _is_date(value: Any) -> bool:
    if not _matches(_CREATED)(value):
        return False
    try:
        datetime.datetime.fromisoformat(value)
    except ValueError:
        return False
    return True


def _is_open_unit(value: Any) -> bool:
    return _finite(value) and 0 < value < 1


_NOT_NEGATIVE = (_from(0), "a finite number of at least 0")
_DIGEST_RULE = (_matches(_DIGEST), "64 hexadecimal digits")

# Of each field: what it must satisfy, and the same in words.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "schema": (_one_of(_SCHEMAS), repr(SCHEMA)),
    "mechanism": (_is_mechanism, "a mechanism's name and fields"),
    "separations": (_or_none(_is_separations), "None or the separations of a mechanism"),
    "noise_scale": (_is_noise, "a positive number or a list of them"),
    "epsilon": _NOT_NEGATIVE,
    "epsilon_lower_bound": (_or_none(_from(0)), "None or a finite number of at least 0"),
    "delta": (_is_open_unit, "a number strictly between 0 and 1"),
    "mu": (_or_none(_from(0)), "None or a finite number of at least 0"),
    "total_variation": (_from(0, 1), "a number from 0 to 1"),
    "accountant": (_one_of(_NOISY_ACCOUNTANTS), f"one of {', '.join(_NOISY_ACCOUNTANTS)}"),
    "steps_run": (_counts(1), "a whole number of at least 1"),
    "evidence": (_one_of(EVIDENCE), f"one of {', '.join(map(repr, EVIDENCE))}"),
    "coverage": (_is_coverage, "parameters, leaves, dtypes, frozen, frozen_parameters"),
    "assumptions": (_is_assumptions, "a list of sentences"),
    "key_source": (_one_of(KEY_SOURCES), f"one of {', '.join(map(repr, KEY_SOURCES))}"),
    "versions": (_is_versions, f"the versions of {', '.join(_PACKAGES)}"),
    "retain_size": (_or_none(_counts(1)), "None or a whole number of at least 1"),
    "forget_size": (_or_none(_counts(0)), "None or a whole number of at least 0"),
    "finetune_steps": (_counts(0), "a whole number of at least 0"),
    "created": (_is_date, "a date such as 2026-01-31T12:00:00+00:00"),
    "params_digest": _DIGEST_RULE,
    "sums_digest": (lambda value: value is None, "None but for a head of integer sums"),
    "record_digest": _DIGEST_RULE,
}
_ZERO = (lambda value: _finite(value) and value == 0, "0 for a mechanism without noise")
# Likewise of what is different for exact mechanisms, which no other may claim.
_EXACT_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "separations": (lambda value: value is None, "None for a mechanism without noise"),
    "noise_scale": _ZERO,
    "epsilon": _ZERO,
    "epsilon_lower_bound": (lambda value: value is None, "None for a mechanism without noise"),
    "delta": _ZERO,
    "mu": _ZERO,
    "total_variation": _ZERO,
    "accountant": (_one_of(("exact",)), "exact for a mechanism without noise"),
    "steps_run": (_counts(0, 0), "0 for a mechanism without noise"),
    "evidence": (_one_of((SAID,)), repr(SAID)),
}
