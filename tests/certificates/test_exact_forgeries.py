"""Forged certificates of each kind do not verify, whatever digest their forger gives them."""

import dataclasses

import pytest
from exact_certificate_helpers import (
    HEADS,
    ISSUED,
    KEPT,
    LABELS,
    MINIMIZER,
    PARAMS,
    ROWS,
    SETTINGS,
    STATS,
)

import certunlearn as cu
from certunlearn import exact
from certunlearn.certificates import record_format
from certunlearn.certificates.record import record_digest

# What a certificate says on the issuer's word, which no recorded number contradicts.
WORD = {"created", "evidence", "finetune_steps", "forget_size", "key_source", "retain_size"}
WORD |= {"versions"}


def forged(name, **changes):
    """The certificate with other fields and a digest to match, as a careful forger makes it."""
    record = dataclasses.asdict(ISSUED[name][0]) | changes
    record["record_digest"] = record_digest(record)
    return cu.Certificate(**record)


def other_mechanism(name, **changes):
    return forged(name, mechanism=ISSUED[name][0].mechanism | changes)


# ------------------------------------------------------------------------------ forgeries

ZEROS = ("noise_scale", "epsilon", "delta", "mu", "total_variation", "steps_run")
EXACT_CLAIM = {**dict.fromkeys(ZEROS, 0), "accountant": "exact", "evidence": "word of the issuer"}


@pytest.mark.parametrize("name", ["minimizer", "noisy"])
@pytest.mark.parametrize(
    "changes",
    [
        EXACT_CLAIM,
        EXACT_CLAIM | {"epsilon_lower_bound": None},
        {"noise_scale": 0.0},
        {"noise_scale": 0.0, "accountant": "exact"},
        {"delta": 0.0},
        {"epsilon": 0.0},
        {"steps_run": 0},
        {"mu": 0.0, "total_variation": 0.0, "epsilon": 0.0},
        {"accountant": "exact"},
        {"sums_digest": "0" * 64},
    ],
)
def test_no_noisy_mechanism_claims_what_only_exact_ones_may(name, changes):
    assert not cu.verify(forged(name, **changes))


@pytest.mark.parametrize("name", ["retraining", "head"])
@pytest.mark.parametrize(
    "changes",
    [
        *({field: value} for field in ZEROS for value in (1e-300, 1, -1, None, True, [0.0])),
        *({"accountant": other} for other in ("interpolation", "dp-accounting", None)),
        {"epsilon_lower_bound": 0.0},
        {"evidence": "optimizer state"},
        {"separations": {"initial_distance": 0.0}},
        {"assumptions": ["All is well."]},
        {"schema": record_format.THIRD_SCHEMA},
        {"schema": record_format.SECOND_SCHEMA},
        {"mechanism": {"name": "GradientClipping"}},
    ],
)
def test_an_exact_claim_is_zero_everywhere(name, changes):
    assert not cu.verify(forged(name, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"sums_digest": None},
        {"sums_digest": "0" * 64},
        {"sums_digest": exact.digest(STATS).upper()},
        {"params_digest": "0" * 64},
        {"retain_size": 36},
        {"mechanism": {"name": "Retraining"}, "sums_digest": None},
    ],
)
def test_a_head_s_digests_are_those_of_its_sums(changes):
    assert not cu.verify(forged("head", **changes), HEADS["ridge"], stats=STATS)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "lda"},
        {"kind": "mean"},
        {"l2": 2e-2},
        {"l2": 0.0},
        {"bits": 13},
        {"bits": 21},
        {"feature_norm": 2.0},
        {"num_features": 6},
        {"classes": 4},
        {"classes": None, "outputs": 3},
        {"target_norm": 1.0},
        {"class_weights": [1, 2, 1]},
        {"class_weights": [1, 1]},
    ],
)
def test_a_head_s_recipe_and_settings_are_those_of_its_sums(changes):
    certificate = other_mechanism("head", **changes)
    assert not cu.verify(certificate, HEADS["ridge"], stats=STATS)
    assert not exact.replay(certificate, (ROWS[KEPT], LABELS[KEPT]))


def test_an_index_that_was_not_kept_is_not_claimed_by_other_sentences():
    assert not cu.verify(other_mechanism("head", indexed=False))


def test_a_head_of_other_sums_does_not_verify():
    whole = exact.collect(ROWS, LABELS, **SETTINGS)
    theirs = exact.certify(whole, exact.ridge(whole, 1e-2))
    assert not cu.verify(theirs, exact.ridge(whole, 1e-2), stats=STATS)
    assert not cu.verify(theirs, HEADS["ridge"])
    # With the digests of one put into the other, the claim holds by itself: only sums, or the
    # retain data, tell. They do.
    mixed = forged("head", params_digest=theirs.params_digest)
    assert cu.verify(mixed)
    found = cu.verify(mixed, stats=STATS)
    assert "the head of these sums has the SHA-256" in found.problems[0]
    assert not exact.replay(mixed, (ROWS[KEPT], LABELS[KEPT]))
    mixed = forged("head", sums_digest=theirs.sums_digest)
    found = cu.verify(mixed, HEADS["ridge"], stats=STATS)
    assert "stats are not the certified ones" in found.problems[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": "retrained"},
        {"reference": "center"},
        {"gradient_norm": 1e-4},
        {"gradient_norm": 0.0},
        {"strong_convexity": 1.0},
        {"strong_convexity": None},
    ],
)
def test_a_minimiser_s_tolerance_and_reference_decide_its_claim(changes):
    assert not cu.verify(other_mechanism("minimizer", **changes))


def test_a_reference_that_is_swapped_with_its_sentences_still_has_too_little_noise():
    swapped = dataclasses.replace(MINIMIZER, reference="retrained")
    certificate = forged(
        "minimizer",
        mechanism=ISSUED["minimizer"][0].mechanism | {"reference": "retrained"},
        assumptions=list(swapped.assumptions),
    )
    found = cu.verify(certificate)
    assert "mu is recorded as" in found.problems[0]


@pytest.mark.parametrize("name", ["retraining", "head", "minimizer"])
def test_every_field_that_is_changed_alone_is_noticed(name):
    certificate, params = ISSUED[name]
    stats = STATS if name == "head" else None
    for field, value in dataclasses.asdict(certificate).items():
        for other in (None, 0.5, 2, "x", [], {}, not value):
            if other == value and type(other) is type(value):
                continue
            record = dataclasses.asdict(certificate) | {field: other}
            assert not cu.verify(cu.Certificate(**record), params, stats=stats), (field, other)
            if field not in {*WORD, "record_digest", "epsilon_lower_bound"}:
                found = cu.verify(forged(name, **{field: other}), params, stats=stats)
                assert not found, (field, other)


# ------------------------------------------------------------------------------ older formats


def test_format_3_verifies_by_its_own_rules():
    current = ISSUED["noisy"][0]
    old = forged("noisy", schema=record_format.THIRD_SCHEMA)
    assert cu.verify(old)
    assert record_digest(dataclasses.asdict(current)) == current.record_digest
    # It had no mechanisms without noise, and none that minimises: a user's class may have had
    # their names.
    for name in ("retraining", "head", "minimizer"):
        found = cu.verify(forged(name, schema=record_format.THIRD_SCHEMA))
        assert not found
    own = dataclasses.make_dataclass(
        "PerturbedMinimizer",
        [("steps", int, 3)],
        bases=(cu.Mechanism,),
        namespace={
            "separations": lambda self: cu.Separations(
                initial_distance=1.0, contraction=1.0, shift=0.1, steps=3
            ),
            "update": lambda self, center: None,
        },
        frozen=True,
    )
    with pytest.raises(ValueError, match="class name of its own"):
        cu.certify(own(), noise_scale=5.0, delta=1e-5, params=PARAMS, steps_run=3)
    issued = cu.certify(
        type("Mine", (own,), {})(),
        noise_scale=5.0,
        delta=1e-5,
        params=PARAMS,
        steps_run=3,
        accountant="interpolation",
    )
    record = dataclasses.asdict(issued)
    record["mechanism"] = record["mechanism"] | {"name": "PerturbedMinimizer"}
    record["assumptions"][-1] = record["assumptions"][-1].replace("Mine", "PerturbedMinimizer")
    for schema, holds in ((record_format.THIRD_SCHEMA, True), (record_format.SCHEMA, False)):
        record["schema"] = schema
        record["record_digest"] = record_digest(record)
        assert cu.verify(cu.Certificate(**record)).ok is holds
