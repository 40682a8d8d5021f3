import dataclasses
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from certificate_helpers import EXACT, MECHANISM, PARAMS, SIGMA, issue

from certunlearn import accounting
from certunlearn._numerics import files
from certunlearn.accounting import lower_bounds
from certunlearn.certificates.record import Certificate, record_digest
from certunlearn.certificates.verification import verify
from certunlearn.mechanisms import GradientClipping


def test_claim_is_what_the_accountant_derives():
    c = issue()
    assert c.epsilon == 1.0
    assert c.reference == "retrained"
    assert c.mu == pytest.approx(accounting.mu(MECHANISM, noise_scale=SIGMA))
    assert c.total_variation == pytest.approx(0.107, abs=1e-3)  # theory: (1, 1e-5)
    assert c.coverage["parameters"] == 6
    assert c.versions["jax"]


def test_round_trip(tmp_path):
    slower = dataclasses.replace(MECHANISM, learning_rate=np.linspace(0.1, 0.02, 9))
    c = issue(mechanism=slower, epsilon=None)
    c.save(tmp_path / "certificate.json")
    loaded = Certificate.load(tmp_path / "certificate.json")
    assert loaded == c
    outcome = verify(loaded, PARAMS)
    assert outcome.ok
    assert outcome
    assert "1-unlearning" in outcome.summary or "unlearning" in outcome.summary


def test_verify_takes_flat_parameters_from_a_file(tmp_path):
    files.save_params(tmp_path / "p.npz", PARAMS)
    assert verify(issue(), files.load_params(tmp_path / "p.npz"))
    other = verify(issue(), PARAMS | {"b": jnp.zeros(2)})
    assert not other
    assert "not the released ones" in other.problems[0]


def tampered_values(value):
    """Plausible alterations of one JSON value, of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(value - 1, 0) if value else 2]
    if isinstance(value, float):
        return [value * 0.5 or 0.5, value * 1.001 or 1e-3, math.nextafter(value, math.inf)]
    if isinstance(value, str):
        return [value + "x", "0" + value[1:] if value[:1] != "0" else "1" + value[1:]]
    if value is None:
        return [7]
    return []


def leaves(value, path=()):
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))
    else:
        yield path, value


def altered(record, path, value):
    record = json.loads(json.dumps(record))
    place = record
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return record


def passes(record, params=PARAMS):
    try:
        return bool(verify(Certificate(**record), params))
    except (TypeError, ValueError):
        return False


def test_every_altered_field_is_caught():
    record = dataclasses.asdict(issue())
    assert passes(record)
    tried = set()
    for path, value in leaves(record):
        for wrong in tampered_values(value):
            assert not passes(altered(record, path, wrong)), (path, wrong)
            tried.add(path[0])
    assert set(record) - tried <= {"coverage"} | tried
    assert {"epsilon", "delta", "noise_scale", "mechanism", "params_digest"} <= tried
    for name in record.keys() - {
        "separations",
        "sums_digest",
    }:  # a field taken away, or of another kind
        assert not passes({k: v for k, v in record.items() if k != name})
        assert not passes(record | {name: object})


@pytest.mark.parametrize(
    "path",
    [
        ("epsilon",),
        ("delta",),
        ("noise_scale",),
        ("mu",),
        ("total_variation",),
        ("steps_run",),
        ("mechanism", "init_radius"),
        ("mechanism", "clip_norm"),
        ("mechanism", "learning_rate"),
        ("mechanism", "weight_decay"),
    ],
)
def test_a_forger_who_mends_the_digest_is_still_caught(path):
    record = dataclasses.asdict(issue())
    value = record
    for step in path:
        value = value[step]
    wrong = 0.5 if value == 0 else (value - 1 if isinstance(value, int) else value * 0.9)
    forged = altered(record, path, wrong)
    forged["record_digest"] = record_digest(forged)
    outcome = verify(Certificate(**forged))
    assert not outcome
    assert not any("record_digest" in problem for problem in outcome.problems)


def test_forged_assumptions_and_reference_are_caught():
    record = dataclasses.asdict(issue())
    for forged in (
        record | {"assumptions": record["assumptions"][1:]},
        altered(record, ("mechanism", "reference"), "center"),
        altered(record, ("mechanism", "memoryless"), False),
    ):
        forged["record_digest"] = record_digest(forged)
        assert not verify(Certificate(**forged))


def test_stopping_early_is_certified_for_what_was_run():
    early = issue(steps_run=5)
    truth = accounting.epsilon(MECHANISM.first(5), noise_scale=SIGMA, delta=1e-5, **EXACT)
    assert early.epsilon == pytest.approx(truth)
    assert early.epsilon > 1.0
    assert verify(early)


def test_schedule_of_noise_and_early_stop():
    noise = np.linspace(2 * SIGMA, SIGMA, 9)
    c = issue(noise_scale=noise, epsilon=None, steps_run=7)
    truth = accounting.epsilon(MECHANISM.first(7), noise_scale=noise[:7], delta=1e-5, **EXACT)
    assert c.epsilon == pytest.approx(truth)
    assert verify(c)


def test_a_claim_that_does_not_hold_is_not_issued():
    with pytest.raises(ValueError, match="does not hold"):
        issue(noise_scale=0.9 * SIGMA)


def test_closed_form_stopped_where_it_is_unsound_falls_back_to_interpolation():
    m = GradientClipping(
        init_radius=1.0, clip_norm=1.0, learning_rate=1e-3, weight_decay=10.0, steps=500
    )
    sigma = accounting.noise_scale(m, epsilon=1.0, delta=1e-5, accountant="closed-form")
    whole = issue(mechanism=m, noise_scale=sigma, accountant="closed-form")
    assert whole.accountant == "closed-form"
    assert verify(whole)
    early = issue(mechanism=m, noise_scale=sigma, accountant="closed-form", steps_run=1)
    assert early.accountant == "interpolation"
    assert verify(early)


SHORT = dataclasses.replace(MECHANISM, learning_rate=0.5, steps=2)


def test_by_default_the_least_epsilon_is_certified_and_its_accountant_named():
    c = issue(mechanism=SHORT, noise_scale=6.0, epsilon=None, accountant=None)
    claim = {"noise_scale": 6.0, "delta": 1e-5}
    assert (c.epsilon, c.accountant) == accounting.least_epsilon(SHORT, **claim)
    assert c.accountant == "coupling"
    assert c.epsilon < accounting.epsilon(SHORT, **claim, **EXACT)
    assert c.total_variation == accounting.total_variation(SHORT, noise_scale=6.0)
    assert verify(c, PARAMS)
    stateful = dataclasses.replace(SHORT, memoryless=False)
    c = issue(mechanism=stateful, noise_scale=6.0, epsilon=None, accountant=None)
    assert c.accountant == "interpolation"
    assert verify(c, PARAMS)
    early = issue(mechanism=SHORT, noise_scale=6.0, accountant=None, steps_run=1)
    assert early.accountant == "interpolation"  # one step leaves coupling nothing to gain
    assert verify(early)


def test_the_lower_bound_is_recorded_and_shown():
    c = issue()
    bound = accounting.epsilon_lower_bound(MECHANISM, noise_scale=SIGMA, delta=1e-5)
    assert c.epsilon_lower_bound == bound
    assert 0.5 < bound < c.epsilon
    shown = re.search(r"between (\S+) \(an attack reaches it\) and (\S+) ", verify(c).summary)
    least, most = map(float, shown.groups())
    assert bound * (1 - 1e-3) < least <= bound  # text never claims more than the record
    assert c.epsilon <= most < c.epsilon * (1 + 1e-3)
    early = issue(steps_run=5)
    assert bound < early.epsilon_lower_bound < early.epsilon


@pytest.mark.parametrize(
    ("factor", "words"), [(1.01, "the attack reaches"), (3.0, "above epsilon itself"), (0.9, None)]
)
def test_a_lower_bound_that_is_not_reached_is_caught(factor, words):
    record = dataclasses.asdict(issue())
    record["epsilon_lower_bound"] *= factor
    record["record_digest"] = record_digest(record)
    outcome = verify(Certificate(**record))
    assert outcome.ok == (words is None)  # a smaller one is as true
    assert words is None or words in outcome.problems[0]


def test_long_runs_have_no_lower_bound(monkeypatch):
    c = issue()
    for room in (accounting, lower_bounds):
        monkeypatch.setattr(room, "MOST_ATTACKED", 8)
    assert "more than 8 steps" in verify(c).problems[0]
    c = issue()
    assert c.epsilon_lower_bound is None
    assert verify(c)
    assert "at most 1 (certified)" in verify(c).summary


def test_certificates_of_the_first_format_load_and_say_what_they_lack(tmp_path):
    record = dataclasses.asdict(issue()) | {"schema": "certunlearn.certificate/1"}
    del record["epsilon_lower_bound"], record["evidence"]
    record["assumptions"] = record["assumptions"][:-1]
    record["record_digest"] = record_digest(record)
    path = tmp_path / "old.json"
    path.write_text(json.dumps(record))
    old = Certificate.load(path)
    assert old.epsilon_lower_bound is None
    outcome = verify(old, PARAMS)
    assert not outcome
    assert "have the certificate issued anew" in outcome.problems[0]
    old.save(path)  # and may be saved anew, with the same digest
    assert verify(Certificate.load(path)).problems == outcome.problems


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_lower_bounds_out_of_range_are_malformed(value):
    record = dataclasses.asdict(issue()) | {"epsilon_lower_bound": value}
    assert "epsilon_lower_bound must be" in verify(Certificate(**record)).problems[0]


def test_frozen_leaves_are_outside_the_coverage():
    c = issue(frozen=["b"])
    assert c.coverage["parameters"] == 4
    assert c.coverage["frozen"] == ["b"]
    assert c.coverage["frozen_parameters"] == 2
    assert verify(c, PARAMS)
    with pytest.raises(ValueError, match="frozen names no leaf"):
        issue(frozen=["c"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"epsilon": 1.0', '"epsilon": NaN'),
        lambda text: text.replace('"epsilon": 1.0', '"epsilon": Infinity'),
        lambda text: text.replace('"epsilon": 1.0', '"epsilon": "1"'),
        lambda text: text.replace('"epsilon": 1.0', '"epsilon": true'),
        lambda text: text.replace('"epsilon": 1.0', '"epsilon": 1.0, "extra": 1'),
        lambda text: text.replace('"epsilon"', '"eps"'),
        lambda text: text.replace("certificate/4", "certificate/99"),
        lambda text: "\udcff".encode("utf-8", "surrogateescape"),
        lambda text: text.replace('"schema"', '"epsilon": 0.001, "schema"', 1),  # twice
        lambda text: text.replace('"epsilon": 1.0', f'"epsilon": 1{"0" * 400}'),
        lambda text: text.replace('"not said"', '"not said \\u001b[2J"'),
        lambda text: text.replace('"not said"', '"whatever I like"'),
        lambda text: text.replace("+00:00", "+01:00"),
        lambda text: text.replace('"finetune_steps": 3', '"finetune_steps": -3'),
        lambda text: text.replace('"steps_run": 9', '"steps_run": 10'),
        lambda text: "[" * 100_000,
        lambda text: text + " " * 1_000_000,
    ],
)
def test_malformed_files_are_value_errors(tmp_path, spoil):
    path = tmp_path / "certificate.json"
    issue().save(path)
    spoiled = spoil(path.read_text())
    assert spoiled != path.read_text()
    path.write_bytes(spoiled if isinstance(spoiled, bytes) else spoiled.encode())
    with pytest.raises(ValueError, match="not a certificate"):
        Certificate.load(path)


def test_nothing_private_has_a_place_in_a_certificate():
    names = {field.name for field in dataclasses.fields(Certificate)}
    assert not names & {"key", "losses", "history", "trained_digest", "start_digest", "clipped"}


def nested_in_itself():
    tree = {}
    tree["a"] = tree
    return tree


@pytest.mark.parametrize(
    "params",
    [
        "unlearned.npz",
        object(),
        iter([1.0]),
        {1: jnp.ones(1), "a": jnp.ones(1)},
        {},
        {"w": None},
        {"w": jax.random.key(0)},
        {"w": np.array(["text"])},
        {"w": np.ma.masked_array([1.0], [True])},
        {"w": jax.ShapeDtypeStruct((2,), jnp.float32)},
        nested_in_itself(),
    ],
)
def test_odd_parameters_are_a_problem_and_no_traceback(params):
    outcome = verify(issue(), params)
    assert not outcome
    assert "params are not what a certificate can be for" in outcome.problems[0]
    assert outcome.problems[0].isprintable()
