"""What certificates rest on, in sentences, and the sizes that contradict a mechanism."""

import pytest
from mechanism_helpers import DESCENT, REWIND

import certunlearn as cu
from certunlearn.mechanisms import sentences

CLIPPED = {"init_radius": 1.0, "learning_rate": 0.1, "steps": 4}
EVERY = [
    cu.GradientClipping(**CLIPPED, clip_norm=1.0),
    cu.GradientClipping(**CLIPPED, clip_norm=1.0, memoryless=False),
    cu.ModelClipping(**CLIPPED, model_radius=1.0),
    cu.OutputPerturbation(init_radius=1.0),
    cu.ProjectedNoisySGD(**DESCENT),
    cu.ProjectedNoisySGD(**DESCENT, radius=1.0),
    cu.DescentToDelete(**DESCENT),
    cu.RewindToDelete(**REWIND),
]


@pytest.mark.parametrize("m", EVERY, ids=lambda m: type(m).__name__)
def test_every_certificate_names_what_follows_requests_and_data(m):
    for sentence in (
        sentences.POST,
        sentences.REQUESTS,
        sentences.UNSEEN,
        sentences.LAST_ONLY,
        sentences.SECRET,
        sentences.REAL,
    ):
        assert m.assumptions.count(sentence) == 1
    assert "earlier releases" in sentences.REQUESTS
    assert "retain data only" in sentences.POST
    assert "what remains true is conditional" in m.sequence
    assert "may itself tell of them" in m.sequence
    started = [s for s in m.assumptions if s.startswith("The run started within 1.0 of the centre")]
    in_a_ball = hasattr(m, "init_radius") or getattr(m, "radius", None) is not None
    assert len(started) == in_a_ball
    before = isinstance(m, cu.DescentToDelete | cu.RewindToDelete)
    assert m.assumptions.count(sentences.ON_THE_WAY) == before


def test_private_training_names_them_in_its_own_words():
    m = cu.DPSGD(
        clip_norm=1.0, learning_rate=0.1, steps=2, sampling_rate=0.5, batch_size=5, deletions=3
    )
    said = " ".join(m.assumptions)
    for words in (
        "without looking at the released parameters",
        "no data that may still be deleted",
        "not the number of examples",
        "never used again",
    ):
        assert words in said
    assert "a request that depends on the released model is not covered" in m.sequence


def test_whether_a_dropped_step_is_within_the_separation():
    kinds = {type(m): m.tolerates_nonfinite for m in EVERY} | {
        cu.DPSGD: cu.DPSGD.tolerates_nonfinite
    }
    assert kinds == {
        cu.GradientClipping: True,
        cu.ModelClipping: True,
        cu.OutputPerturbation: True,
        cu.ProjectedNoisySGD: False,
        cu.DescentToDelete: False,
        cu.RewindToDelete: False,
        cu.DPSGD: True,
    }
    # It does not contract: a zero update leaves two points as far apart as they were.
    for m in EVERY:
        left = 1.0  # their distance after an update of nothing
        within = all(m.separation(t, 1.0) >= left for t in range(m.steps))
        if type(m) in (cu.ProjectedNoisySGD, cu.DescentToDelete):
            assert not within


@pytest.mark.parametrize(
    ("retain", "forget", "words"),
    [
        (95, 5, None),
        (97, 3, None),
        (97, None, None),
        (None, None, None),
        (94, None, "retain_size must be from 95 to 99"),
        (100, None, "retain_size must be from 95 to 99"),
        (None, 6, "forget_size must be at most deletions=5"),
        (98, 4, "at most size=100 together"),
    ],
)
def test_sizes_that_contradict_a_rewind_are_named(retain, forget, words):
    problems = cu.RewindToDelete(**REWIND).size_problems(retain, forget)
    if words is None:
        assert problems == []
    else:
        assert len(problems) == 1
        assert words in problems[0]


def test_sizes_that_contradict_private_training_are_named():
    m = cu.DPSGD(
        clip_norm=1.0, learning_rate=0.1, steps=2, sampling_rate=0.5, batch_size=5, deletions=3
    )
    assert m.size_problems(None, 3) == []
    assert "private" in m.size_problems(50, None)[0]
    assert "at most deletions=3, got 49" in m.size_problems(None, 49)[0]
    assert cu.OutputPerturbation(init_radius=1.0).size_problems(3, 50) == []
