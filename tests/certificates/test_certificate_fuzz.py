"""Whatever a certificate file holds: a documented answer, and never a claim that does not hold."""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math

import jax.numpy as jnp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import certunlearn as cu
from certunlearn import accounting, cli, mechanisms
from certunlearn.certificates import Certificate, claims, issuing
from certunlearn.certificates.record import record_digest
from certunlearn.certificates.verification import verify
from certunlearn.mechanisms import DPSGD, GradientClipping, ModelClipping, records, sentences

PARAMS = {"w": jnp.arange(4.0), "frozen": jnp.ones(2)}
SHORT = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.5, steps=2)
VARIED = GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=[0.1, 0.2, 0.1], steps=3)
DECAYING = GradientClipping(
    init_radius=1.0, clip_norm=1.0, learning_rate=0.1, weight_decay=0.1, steps=4, memoryless=False
)
MODELS = ModelClipping(init_radius=1.0, model_radius=1.0, learning_rate=0.1, steps=3)
PRIVATE = DPSGD(
    clip_norm=1.0, learning_rate=0.5, steps=3, sampling_rate=0.1, batch_size=50, deletions=2
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sideways(cu.Mechanism):
    """A method that certunlearn does not have."""

    steps: int
    length: float

    def separations(self):
        return cu.Separations(
            initial_distance=2.0,
            contraction=[1.5, 0.5, 0.8, 0.6],
            shift=self.length,
            noisy=[True, False, True, True],
            assumptions=["It steps aside."],
        )

    def update(self, center):
        raise NotImplementedError


# By the name of their accountant, or as what they are.
CASES = {
    "interpolation": (VARIED, [6.0, 7.0, 6.0]),
    "closed-form": (DECAYING, 6.0),
    "coupling": (SHORT, 6.0),
    "product": (MODELS, 6.0),
    "dp-accounting": (PRIVATE, 2.0),
    "own": (Sideways(steps=4, length=0.1), 6.0),
    "exact": (cu.Retraining(), None),
}
# The issuer's word, which no recorded number contradicts.
WORD = {
    *("created", "evidence", "finetune_steps", "forget_size", "key_source", "retain_size"),
    "versions",
}


@functools.cache
def _issued(accountant):
    mechanism, noise_scale = CASES[accountant]
    certificate = issuing.certify(
        mechanism,
        noise_scale=noise_scale,
        delta=None if accountant == "exact" else 1e-5,
        params=PARAMS,
        steps_run=mechanism.steps,
        accountant="interpolation" if accountant == "own" else accountant,
        frozen=["frozen"],
        forget_size=1,
        retain_size=None if accountant == "dp-accounting" else 9,
    )
    return json.dumps(dataclasses.asdict(certificate))


def issued(accountant):
    """A certificate's record, whose claim is by this accountant."""
    return json.loads(_issued(accountant))


def paths(record, path=()):
    """Every place in a record, those of its lists and objects too."""
    for name, item in record.items() if isinstance(record, dict) else enumerate(record):
        yield (*path, name)
        if isinstance(item, dict | list):
            yield from paths(item, (*path, name))


def at(record, path):
    return functools.reduce(lambda place, step: place[step], path, record)


def altered(record, path, value):
    """A copy of the record with another value there; as it is, if the place is gone."""
    record = json.loads(json.dumps(record))
    with contextlib.suppress(KeyError, IndexError, TypeError):
        at(record, path[:-1])[path[-1]] = value
    return record


ODD = (
    *(None, True, False, 0, 1, 2, -1, 10**15, 10**30, -(10**30), 10**400),
    *(0.0, -0.0, 0.5, 3.0, -1.5, 5e-324, 1e-300, 1e60, 1e300, math.nan, math.inf, -math.inf),
    *("", "1", "x", "\x1b[2J", "\u202e", "\ud800", "a\nb", "1" * 3000, "center", "coupling"),
    *([], [None], ["x"], [0], [1.0] * 3, [[1.0]], [math.nan], ["a\x00"]),
    *({}, {"a": 1}, {"name": "DPSGD"}),
)


def near(value):
    """Other values of the same kind: those that a forger would try."""
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int | float):
        return (value / 2, value * 2, value + 1, value - 1, -value, int(value))
    if isinstance(value, str):
        return (value[:-1], value + " ", value.upper(), value + "\u0301")
    if isinstance(value, list):
        return (value[:-1], value[1:], value * 2, value[::-1], [*value, value])
    return ()


def mended(record):
    """The record with the digest that it should have, if it can have one."""
    with contextlib.suppress(TypeError, ValueError):
        record["record_digest"] = record_digest(record)
    return record


def assert_shown(text):
    for line in text.split("\n"):
        assert line.isascii(), ascii(line)
        assert line.isprintable(), ascii(line)


def assert_answered(record, folder):
    """Both ways of getting at a record answer as documented; whether it verifies."""
    outcome = verify(Certificate(**record), PARAMS)
    assert outcome.ok == (not outcome.problems)
    assert all("\n" not in problem for problem in outcome.problems)
    for text in (outcome.summary, *outcome.problems):
        assert_shown(text)
    path = folder / "certificate.json"
    path.write_text(json.dumps(record))
    try:
        loaded = Certificate.load(path)
    except ValueError as error:
        assert_shown(str(error))
        assert not outcome
    else:
        assert loaded == Certificate(**record)
    if outcome:
        claim = ("mechanism", "separations", "noise_scale", "steps_run", "accountant", "delta")
        epsilon, variation, assumptions = derived(
            json.dumps({name: record[name] for name in claim})
        )
        assert epsilon <= record["epsilon"] * (1 + 1e-5)
        assert variation <= record["total_variation"] * (1 + 1e-5)
        assert assumptions == record["assumptions"]
    return outcome.ok


@functools.cache
def derived(text):
    """Epsilon, total variation and assumptions that follow from the recorded numbers."""
    record = json.loads(text)
    trust = []
    if record["separations"] is None:
        planned = mechanisms.from_record(record["mechanism"])
    else:
        planned = records.separations_from_record(record["separations"])
        trust = [sentences.trusted_separations(record["mechanism"]["name"])]
    run = planned.first(record["steps_run"])
    scale = mechanisms.checked_noise(planned, record["noise_scale"])
    claim = {
        "noise_scale": claims.first_steps(scale, run.steps),
        "accountant": record["accountant"],
        "delta": record["delta"],
    }
    variation = accounting.total_variation(run, **claim)
    return accounting.epsilon(run, **claim), variation, [*planned.rests_on(), *trust]


@pytest.mark.parametrize("accountant", CASES)
def test_what_was_issued_verifies(accountant, tmp_path):
    record = issued(accountant)
    assert record["accountant"] == (accountant if accountant != "own" else "interpolation")
    assert assert_answered(record, tmp_path)


@pytest.mark.parametrize("accountant", CASES)
def test_every_altered_field_is_answered(accountant, tmp_path):
    record = issued(accountant)
    for path in paths(record):
        value = at(record, path)
        for wrong in near(value):
            if wrong != value:
                assert not assert_answered(altered(record, path, wrong), tmp_path), (path, wrong)
    for name in record:
        cut = {field: value for field, value in record.items() if field != name}
        (tmp_path / "cut.json").write_text(json.dumps(cut))
        if name in ("epsilon_lower_bound", "sums_digest"):  # absent is None
            continue
        with pytest.raises(ValueError, match=r"missing fields|schema must be"):
            Certificate.load(tmp_path / "cut.json")


@pytest.mark.slow
@pytest.mark.parametrize("accountant", CASES)
def test_a_forger_who_mends_the_digest_gains_nothing(accountant, tmp_path):
    record = issued(accountant)
    for path in paths(record):
        value = at(record, path)
        # A claim takes a second by coupling, so not every value.
        for wrong in near(value)[:: 2 if accountant == "coupling" else 1]:
            if wrong == value or path == ("record_digest",):
                continue
            if assert_answered(mended(altered(record, path, wrong)), tmp_path):
                # The claim of another mechanism may be the same and true: no more than that.
                same = ("epsilon_lower_bound", "mechanism", "separations")
                # Coupling gets tighter with versions, so a record may claim less than is known.
                claims_less = accountant == "coupling" and (
                    path[0] in ("epsilon", "total_variation") and wrong > value
                )
                assert path[0] in (*WORD, *same) or claims_less, (path, wrong)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_two_places_with_anything_in_them_are_answered(data, tmp_path_factory):
    record = original = issued(data.draw(st.sampled_from(tuple(CASES))))
    places = tuple(paths(original))
    for _ in range(2):
        path = data.draw(st.sampled_from(places))
        values = st.sampled_from((*ODD, *near(at(original, path)))) | JSON
        record = altered(record, path, data.draw(values))
    assert_answered(mended(record), tmp_path_factory.getbasetemp())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_bytes_are_a_certificate_or_a_value_error(data, tmp_path_factory):
    content = bytearray(_issued(data.draw(st.sampled_from(tuple(CASES)))).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.integers(0, 2))
        if kind == 0:
            content[place] = data.draw(st.integers(0, 255))
        elif kind == 1:
            content[place:place] = data.draw(st.binary(max_size=8))
        else:
            del content[place : place + data.draw(st.integers(1, 30))]
    path = tmp_path_factory.getbasetemp() / "bytes.json"
    path.write_bytes(bytes(content))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(["verify", str(path)])
    assert code in (0, 1)
    assert_shown(out.getvalue())
    assert_shown(err.getvalue())
    try:
        assert (code == 0) == verify(Certificate.load(path)).ok
    except ValueError:
        assert code == 1


POSITIVE = st.floats(1e-9, 1e9)


@settings(max_examples=60, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {
            "init_radius": POSITIVE,
            "clip_norm": POSITIVE,
            "learning_rate": st.lists(POSITIVE, min_size=3, max_size=3) | POSITIVE,
            "weight_decay": st.just(0) | st.floats(0, 1e-9),
            "reference": st.sampled_from(["retrained", "center"]),
        }
    ),
    scale=st.lists(POSITIVE, min_size=3, max_size=3) | POSITIVE,
    delta=st.floats(1e-12, 0.9),
    ran=st.integers(1, 3),
)
@pytest.mark.slow
def test_whatever_is_issued_verifies(fields, scale, delta, ran, tmp_path_factory):
    mechanism = GradientClipping(**fields, steps=3, memoryless=False)
    try:
        certificate = issuing.certify(
            mechanism, noise_scale=scale, delta=delta, params=SMALL, steps_run=ran
        )
    except ValueError:
        return
    path = tmp_path_factory.getbasetemp() / "issued.json"
    certificate.save(path)
    assert Certificate.load(path) == certificate
    assert verify(Certificate.load(path), SMALL).problems == ()


# So small that hardly any noise is lost in their rounding.
SMALL = {"w": 1e-9 * jnp.arange(4.0)}


@pytest.mark.slow
@pytest.mark.parametrize("accountant", CASES)
def test_every_pair_of_altered_fields_is_answered(accountant, tmp_path):
    record = issued(accountant)
    places = [path for path in paths(record) if path[0] not in ("assumptions", "versions")]
    # A claim takes a second by some accountants, so not every pair for these.
    every = 199 if accountant in ("coupling", "dp-accounting") else 17
    for first, second in itertools.islice(itertools.combinations(places, 2), 0, None, every):
        for one, other in itertools.product(
            near(at(record, first))[:2], near(at(record, second))[:2]
        ):
            changed = altered(altered(record, first, one), second, other)
            assert_answered(mended(changed), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("accountant", CASES)
def test_anything_anywhere_is_answered(accountant, tmp_path):
    record = issued(accountant)
    every = 11 if accountant in ("coupling", "dp-accounting") else 2
    for path, odd in itertools.islice(itertools.product(paths(record), ODD), 0, None, every):
        assert_answered(mended(altered(record, path, odd)), tmp_path)
