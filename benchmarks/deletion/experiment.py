"""One seed of the benchmark: tuning on held-out rows, requests, methods and their yardsticks."""

import itertools
import time
from typing import Any, NamedTuple

import numpy as np

import certunlearn as cu
from benchmarks.deletion import clipping, costs, deletions, features, retraining
from benchmarks.deletion.deletions import Request
from benchmarks.deletion.features import Features, Split
from benchmarks.deletion.retraining import Family, Public, Reached, Setting, Tuned

KINDS = ("random", "one class")
L2 = (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)  # of the ridge head, chosen on held-out rows
TIMED = 3  # retrainings that are timed: the quickest in the run without evaluation


class Plan(NamedTuple):
    """How much to do.

    Attributes:
      sizes: numbers of rows to forget.
      chain: requests of a chain.
      rounds: of timing.
      every: of the settings of tuning, each so-manieth is tried.
    """

    sizes: tuple[int, ...] = (1, 10, 100, 250)
    chain: int = 20
    rounds: int = 9
    every: int = 1


def run(everything: Features, seed: int, plan: Plan) -> dict[str, Any]:
    """All that one seed measures."""
    split = features.split(everything, seed)
    public = retraining.public_knowledge(split)
    say = lambda text: print(f"seed {seed}: {text}", flush=True)  # noqa: E731
    l2 = ridge_penalty(split)
    begun = time.perf_counter()
    start = deletions.exact_start(split, l2)
    preparation = time.perf_counter() - begun
    head = np.asarray(cu.exact.ridge(start.kept))
    trained = deletions.minimiser(split, deletions.tolerance())
    say(f"ridge's l2 {l2:g}; heads trained")
    targets = {
        name: retraining.accuracy(each, split.validation)
        for name, each in (("ridge", head), ("softmax", trained.head))
    }
    tuned = retraining.tune(split, public, targets, plan.every)
    chosen = clipping.tuned(
        split, public, trained.head, tuned["ridge"], targets["ridge"], seed, plan.every
    )
    say("tuned")
    heads = {
        "public head, least squares": public.heads["squares"],
        "public head, softmax": public.heads["softmax"],
        "class sums in public curvature": class_sums_head(split, public),
        "exact ridge": head,
        "softmax minimiser": trained.head,
    }
    record: dict[str, Any] = {
        "seed": seed,
        "rows": {name: len(part.y) for name, part in split._asdict().items() if name != "classes"},
        "features": head.shape[0],
        "outputs": head.shape[1],
        "l2": l2,
        "clipping": {**chosen._asdict(), "family": str(chosen.family)},
        "exact_preparation_seconds": preparation,
        "heads": {name: both(found, split) for name, found in heads.items()},
        "retraining": {name: families(found) for name, found in tuned.items()},
        "requests": [],
    }
    for kind, size in itertools.product(KINDS, plan.sizes):
        asked = deletions.request(split, kind, size, seed)
        record["requests"].append(
            serve(split, public, asked, plan, start, trained, tuned, chosen, seed)
        )
        say(f"{kind}, {size}: done")
    equal = deletions.chain(start, split, plan.chain, min(plan.sizes[-1], 10), seed)
    record["chain"] = {"requests": plan.chain, "equal": equal}
    assert equal == plan.chain, "a chain's bits differ from those of a fresh training"
    return record


def both(head: np.ndarray, split: Split) -> dict[str, float]:
    """Accuracy on held-out and on test rows."""
    return {
        "validation": retraining.accuracy(head, split.validation),
        "test": retraining.accuracy(head, split.test),
    }


def ridge_penalty(split: Split) -> float:
    """The weight of the L2 term that is best on held-out rows."""
    stats = deletions.collect(split.train, split.classes)
    scores = [retraining.accuracy(cu.exact.ridge(stats, l2), split.validation) for l2 in L2]
    return L2[int(np.argmax(scores))]


def class_sums_head(split: Split, public: Public) -> np.ndarray:
    """The head that the start by class sums is."""
    family = Family("squares", "SGD", "class sums")
    return retraining.begin(family, split.train, split.classes, public).begin()


def families(found: Tuned) -> list[dict[str, Any]]:
    """What tuning found, the cheapest first."""
    order = sorted(found.items(), key=lambda item: item[1][1].cost.flops)
    return [described(family, setting, reached) for family, (setting, reached) in order]


def serve(
    split: Split,
    public: Public,
    asked: Request,
    plan: Plan,
    start: deletions.ExactStart,
    trained: deletions.Minimiser,
    tuned: dict[str, Tuned],
    chosen: clipping.Chosen,
    seed: int,
) -> dict[str, Any]:
    """One request: what each system does, and the cheapest retrainings to the same accuracy."""
    done = {**deletions.exact(start, asked, split.classes)}
    done["perturbed minimiser"] = deletions.perturbed(trained, asked)
    rows = {name: summary(each, split) for name, each in done.items()}
    wanted = {"ridge": rows["exact, fast"], "softmax": rows["perturbed minimiser"]}
    rows |= clipping.rows(split, public, asked, trained.head, chosen, wanted["ridge"], seed)
    marks = {
        name: retraining.yardsticks(
            split, public, asked.retain, tuned[name], row["validation"], row["test"]
        )
        for name, row in wanted.items()
    }
    # What takes milliseconds is repeated more often than what takes seconds.
    runs = {name: each.run for name, each in done.items()}
    slow = {name: runs.pop(name) for name in ("exact, anew", "perturbed minimiser")}
    quickest = {name: quickest_of(found) for name, found in marks.items()}
    seconds = costs.timed(runs | quickest["ridge"], plan.rounds)
    seconds |= costs.timed(slow | quickest["softmax"], max(1, plan.rounds // 3))
    cheapest = min(marks["ridge"], key=lambda mark: mark.reached.cost.flops)
    certificate = cu.certify(cu.Retraining(), params=cheapest.run())
    for name, row in rows.items():
        row.update(seconds.get(name, {}))
    return {
        "kind": asked.kind,
        "size": asked.size,
        "rows": rows,
        "retraining_certificate": {"epsilon": certificate.epsilon, "delta": certificate.delta},
        "retraining": {
            name: [
                described(mark.family, mark.setting, mark.reached)
                | seconds.get(str(mark.family) * (str(mark.family) in quickest[name]), {})
                for mark in found
            ]
            for name, found in marks.items()
        },
    }


def summary(done: deletions.Deleted, split: Split) -> dict[str, Any]:
    """A row of the record, without its times."""
    return {
        "examples": done.cost.examples,
        "flops": done.cost.flops,
        "epsilon": done.epsilon,
        "delta": done.delta,
        **both(done.head, split),
    }


def described(family: Family, setting: Setting, reached: Reached) -> dict[str, Any]:
    """A retraining as a row of the record."""
    return {
        **family._asdict(),
        "public_curvature": retraining.in_public_curvature(family, setting),
        "setting": setting,
        "examples": reached.cost.examples,
        "flops": reached.cost.flops,
        "flops_by_test": reached.test_cost.flops,
        "validation": reached.validation,
        "test": reached.test,
    }


def quickest_of(found: list[retraining.Yardstick]) -> dict[str, Any]:
    """The retrainings to be timed: the quickest of all, and of those without public curvature."""
    reached = [mark for mark in found if mark.reached.point]
    without = [m for m in reached if not retraining.in_public_curvature(m.family, m.setting)]
    chosen: dict[str, Any] = {}
    for each in (reached, without):
        for key in (lambda m: m.reached.seconds, lambda m: m.reached.cost.flops):
            chosen |= {str(m.family): m.run for m in sorted(each, key=key)[:TIMED]}
    return chosen
