"""The published form of certificates: true of every one that is issued, and of no broken one."""

import dataclasses
import functools
import importlib.resources
import json
import re
from pathlib import Path

import jsonschema
import jsonschema.validators
import pytest
from certificate_helpers import issue
from every_system import OTHERS, PARAMS, SYSTEMS, accountant
from exact_certificate_helpers import HEADS, ISSUED, STATS

import certunlearn as cu
from certunlearn.certificates import record_format
from certunlearn.mechanisms import MECHANISMS, records

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads(
    importlib.resources.files("certunlearn.certificates")
    .joinpath("certificate.schema.json")
    .read_text()
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
PLAIN = cu.Separations(
    initial_distance=2.0,
    contraction=[1.0, 0.9, 1.0],
    shift=[0.1, 0.0, 0.2],
    noisy=[True, False, True],
    assumptions=["As theorem 1 of the paper says."],
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(cu.Mechanism):
    lengths: tuple[float, ...]
    label: str = "as in the paper"
    bound: float | None = None

    steps = 2

    def separations(self):
        return cu.Separations(
            initial_distance=1.0, contraction=1.0, shift=self.lengths, diameter=4.0
        )

    def update(self, center):
        raise NotImplementedError


def certified(mechanism, **changes):
    run = {
        "noise_scale": 50.0,
        "delta": 1e-5,
        "steps_run": mechanism.steps,
        "accountant": accountant(mechanism),
    }
    if mechanism.exact:
        run = {}
    return cu.certify(mechanism, params=PARAMS, **(run | changes))


@functools.cache
def issued():
    """A certificate of every kind, as its file holds it."""
    found = {name: certified(each) for name, each in (SYSTEMS | OTHERS).items()}
    found |= {f"issued {name}": certificate for name, (certificate, _) in ISSUED.items()}
    found["discriminants"] = cu.exact.certify(STATS, HEADS["lda"])
    found["clipping"] = issue(frozen=["b"])
    found["schedules"] = certified(
        cu.GradientClipping(init_radius=1.0, clip_norm=[1, 2], learning_rate=[0, 0.1], steps=2),
        noise_scale=[40.0, 50.0],
        accountant="coupling",
    )
    found["plain"] = certified(PLAIN, accountant="interpolation")
    found["own"] = certified(Own(lengths=(0.1, 0.2)), accountant="interpolation")
    return {name: json.loads(certificate.to_json()) for name, certificate in found.items()}


def older(record, number):
    """The record as format 2 or 3 would have it."""
    record = record | {"schema": f"certunlearn.certificate/{number}"}
    return record if number > 2 else {k: v for k, v in record.items() if k != "separations"}


def test_the_schema_itself_is_valid():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert jsonschema.validators.validator_for(SCHEMA) is jsonschema.Draft202012Validator


def test_certificates_of_every_mechanism_have_this_form():
    records_of = issued()
    assert set(MECHANISMS) <= {record["mechanism"]["name"] for record in records_of.values()}
    for name, record in records_of.items():
        VALIDATOR.validate(record)
        assert not record_format.problems(record), name


def test_committed_and_older_certificates_have_this_form():
    committed = sorted((ROOT / "benchmarks").glob("demo-*/certificate.json"))
    files = [json.loads(path.read_text()) for path in committed]
    assert len(files) >= 2
    for record in files:
        VALIDATOR.validate(record)
    for name, record in issued().items():
        for number in (3, 2):
            old = older(record, number)
            # No mechanism without noise, and no minimiser; of others' own, format 2 had none.
            known = not record_format.problems(old)
            assert VALIDATOR.is_valid(old) is known, (name, number)
    # What was issued without a lower bound still is a certificate.
    less = {k: v for k, v in issued()["model"].items() if k != "epsilon_lower_bound"}
    VALIDATOR.validate(less)


def test_the_schema_names_every_field():
    fields = {field.name for field in dataclasses.fields(cu.Certificate)}
    assert set(SCHEMA["properties"]) == fields
    for name in MECHANISMS:
        form = SCHEMA["$defs"][name]
        declared = {field.name for field in dataclasses.fields(MECHANISMS[name])} - {"transform"}
        assert set(form["properties"]) == set(form["required"]) == declared | {"name"}
    stated = SCHEMA["properties"]["separations"]["anyOf"][0]
    assert set(stated["properties"]) == set(records.separations_to_record(PLAIN))
    assert SCHEMA["properties"]["key_source"]["enum"] == list(record_format.KEY_SOURCES)
    assert SCHEMA["properties"]["accountant"]["enum"] == list(record_format.ACCOUNTANTS)


def test_the_page_describes_every_field():
    page = (ROOT / "docs" / "certificate-format.md").read_text()
    described = set(re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE))
    names = set(SCHEMA["properties"]) | set(SCHEMA["properties"]["coverage"]["properties"])
    for mechanism in MECHANISMS:
        names |= set(SCHEMA["$defs"][mechanism]["properties"]) - {"name"}
    assert described - set(MECHANISMS) == names


WRONG_EVERYWHERE = {
    "schema": [None, 4, "certunlearn.certificate/1", "certunlearn.certificate/5"],
    "mechanism": [None, [], {}, {"name": "GradientClipping"}, {"name": "a b"}, {"name": 3}],
    "noise_scale": [None, "1.0", "NaN", -1.0, [], [1.0, -1.0], ["1.0"], True, 1e99],
    "epsilon": [None, "1.0", "NaN", "Infinity", -0.5, [1.0], True],
    "epsilon_lower_bound": ["0.5", -0.5, True, [0.5]],
    "delta": [None, "1e-5", -1e-5, 1, 2.0, True],
    "mu": ["0.1", -0.1, True],
    "total_variation": [None, "0.1", -0.1, 1.1],
    "accountant": [None, "mine", "Coupling", ["coupling"]],
    "steps_run": [None, "3", -1, 2.5, 10**7, True],
    "evidence": [None, "", "trust me"],
    "separations": ["none", 3, [], {}, {"initial_distance": 1.0}],
    "coverage": [None, {}, [], {"parameters": 3}],
    "assumptions": [None, [], "none", [3], ["two\nlines"], ["é"], ["x" * 2_001]],
    "key_source": [None, "", "0"],
    "versions": [None, {}, {"jax": "0.8.1"}],
    "retain_size": ["9", 0, -1, 1.5, True],
    "forget_size": ["9", -1, 1.5, True],
    "finetune_steps": [None, "0", -1, 1.5],
    "created": [None, "yesterday", "2026-01-31", "2026-01-31T12:00:00Z", 0],
    "params_digest": [None, "", "A" * 64, "a" * 63, "a" * 65, "a" * 64 + "\n", 7],
    "sums_digest": ["", "a" * 63, 7],
    "record_digest": [None, "", "g" * 64],
}


@pytest.mark.parametrize("name", ["model", "own", "issued head"])
def test_no_broken_record_has_this_form(name):
    record = issued()[name]
    assert set(WRONG_EVERYWHERE) == set(SCHEMA["properties"])
    for field, values in WRONG_EVERYWHERE.items():
        for value in values:
            broken = record | {field: value}
            assert not VALIDATOR.is_valid(broken), (field, value)
            # Of a mechanism's fields the package asks later; format 1 it reads, to refuse it.
            known = field == "mechanism" or value == record_format.FIRST_SCHEMA
            assert known or record_format.problems(broken), (field, value)
    for field in set(record) - {"epsilon_lower_bound", "sums_digest"}:
        missing = {k: v for k, v in record.items() if k != field}
        assert not VALIDATOR.is_valid(missing), field
    assert not VALIDATOR.is_valid(record | {"note": "ours is better"})
    for field in ("coverage", "versions"):
        assert not VALIDATOR.is_valid(record | {field: record[field] | {"more": 1}})
    for field in record["coverage"]:
        for value in ("1", None, -1, {}):
            broken = record["coverage"] | {field: value}
            assert not VALIDATOR.is_valid(record | {"coverage": broken}), (field, value)


@pytest.mark.parametrize("name", [*SYSTEMS, *OTHERS, "clipping", "issued head", "plain"])
def test_a_mechanisms_fields_are_its_own(name):
    record = issued()[name]
    stated = record["mechanism"]
    # That part of the schema alone, which is checked faster.
    part = {"$ref": "#/$defs/packageMechanism", "$defs": SCHEMA["$defs"]}
    form = jsonschema.Draft202012Validator(part)
    assert form.is_valid(stated)
    for field in stated:
        assert not form.is_valid({k: v for k, v in stated.items() if k != field}), field
        for value in ("much", {"a": 1}, -3.0, [None]):
            assert not form.is_valid(stated | {field: value}), (field, value)
    assert not VALIDATOR.is_valid(record | {"mechanism": stated | {"name": "GradientClippin"}})
    assert not VALIDATOR.is_valid(record | {"mechanism": stated | {"radius_2": 1.0}})
    separations = issued()["own"]["separations"]
    assert not VALIDATOR.is_valid(record | {"separations": separations})


def test_no_noise_goes_with_claims_of_zero_only():
    exact, noisy = issued()["issued head"], issued()["model"]
    for field in ("noise_scale", "epsilon", "delta", "mu", "total_variation", "steps_run"):
        assert not VALIDATOR.is_valid(exact | {field: 0.5 if field != "steps_run" else 1}), field
    for field in ("noise_scale", "delta", "steps_run"):
        assert not VALIDATOR.is_valid(noisy | {field: 0}), field
    for record, other in ((exact, noisy), (noisy, exact)):
        assert not VALIDATOR.is_valid(record | {"accountant": other["accountant"]})
    assert not VALIDATOR.is_valid({k: v for k, v in exact.items() if k != "sums_digest"})
    assert not VALIDATOR.is_valid(noisy | {"sums_digest": exact["sums_digest"]})
    stripped = {k: v for k, v in issued()["own"].items() if k != "separations"}
    assert not VALIDATOR.is_valid(stripped | {"separations": None})
