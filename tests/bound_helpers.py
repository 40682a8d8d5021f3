"""Every strict bound, compiled in every way, over all magnitudes; also run under fast-math.

`python tests/bound_helpers.py` checks all and exits 1 at the first bound that does not hold.
"""

import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import certunlearn as cu
from certunlearn import transforms
from certunlearn._numerics import normal_draws, norms

# What clipping may cost: the norm is aimed at, not only bounded.
LOSS = 3e-5
# More than one run of the folded sum.
WIDTH = 300
EXPONENTS = (-45, -40, -38, -37, -30, -20, -10, -1, 0, 5, 15, 19, 20, 30, 36, 37.5, 38, 38.5)
RADII = (1e-30, 1e-19, 1e-3, 1.0, 7.0, 1e19, 1e30)


def one_by_one(f):
    return lambda *rows: stacked([f(*row) for row in zip(*rows, strict=True)])


def stacked(results):
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *results)


def scanned(f):
    return lambda *rows: jax.lax.scan(lambda _, row: (0, f(*row)), 0, rows)[1]


MODES = {
    "eager": one_by_one,
    "jit": lambda f: one_by_one(jax.jit(f)),
    "vmap": jax.vmap,
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "scan": scanned,
    "jit of scan": lambda f: jax.jit(scanned(f)),
    "map": lambda f: lambda *rows: jax.lax.map(lambda row: f(*row), rows),
    "vmap of vmap": lambda f: (
        lambda *rows: jax.tree.map(
            lambda leaf: leaf[0],
            jax.vmap(jax.vmap(f))(*(jnp.asarray(row)[None] for row in rows)),
        )
    ),
}


def exact_norm(row):
    """To about 1e-18 of itself, over all exponents of float64."""
    row = np.asarray(row, np.longdouble).ravel()
    return np.sqrt(np.sum(np.square(row)))


def inputs(dtype=np.float32):
    """Rows of all magnitudes and shapes, each with every radius."""
    rng, rows = np.random.default_rng(0), []
    for exponent in EXPONENTS:
        size = dtype(10.0**exponent) if exponent < 38.4 else np.finfo(np.float32).max.astype(dtype)
        rows.append(np.full(WIDTH, size))
        spike = (rng.normal(size=WIDTH) * float(size) * 1e-6).astype(dtype)
        spike[rng.integers(WIDTH)] = -size
        rows.append(spike)
    rows.append(np.zeros(WIDTH, dtype))
    for place, bad in ((0, np.nan), (WIDTH - 1, np.inf), (200, -np.inf)):
        row = rng.normal(size=WIDTH).astype(dtype)
        row[place] = bad
        rows.append(row)
    pairs = [(row, dtype(radius)) for row in rows for radius in RADII]
    return tuple(np.stack(part) for part in zip(*pairs, strict=True))


def check_clip(mode, dtype=np.float32, fast=False):
    rows, radii = inputs(dtype)
    out = MODES[mode](lambda row, radius: norms.clip_tree({"w": row}, radius))(rows, radii)
    clipped = np.asarray(out.tree["w"])
    assert clipped.dtype == dtype
    room = 1 - 4 * np.finfo(dtype).eps / 2
    for i, (row, radius) in enumerate(zip(rows, radii, strict=True)):
        before, after = exact_norm(row), exact_norm(clipped[i])
        case = f"{mode}: norm {before}, radius {radius}, clipped {after}"
        assert after <= np.longdouble(radius) * room, case
        if not np.isfinite(before):
            assert after == 0, case
            assert out.nonfinite[i], case
        elif before <= radius * (1 - LOSS):
            # Fast-math may flush what is below the smallest normal number.
            kept = np.where(np.abs(row) < 2.0**-126, clipped[i], row) if fast else row
            np.testing.assert_array_equal(clipped[i], kept)
            assert not out.clipped[i], case
        else:
            assert after >= radius * (1 - LOSS), case
            assert not out.nonfinite[i], case


def check_norm_bound(mode, dtype=np.float32):
    rows, radii = inputs(dtype)
    bounds = MODES[mode](lambda row, _: norms.norm_bound({"w": row}))(rows, radii)
    for row, bound in zip(rows, np.asarray(bounds), strict=True):
        exact = exact_norm(row)
        if not np.isfinite(exact):
            assert np.isnan(bound), (exact, bound)
        else:
            assert np.longdouble(bound) >= exact, (exact, bound)
            near = exact * (1 + LOSS) + 1e-36  # tiny numbers count as 2^-126
            assert bound <= near or near > np.finfo(dtype).max, (exact, bound)


def check_rate(mode):
    """A rounded learning rate times a clipped gradient is no longer than both say."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(200, 40)).astype(np.float32)
    rates = rng.uniform(1e-3, 1, 200)
    rounded = rates.astype(np.float32)
    out = MODES[mode](lambda row, rate: rate * norms.clip_tree(row, 0.3).tree)(rows, rounded)
    for update, rate in zip(np.asarray(out), rates, strict=True):
        assert 0.3 * rate * (1 - LOSS) <= exact_norm(update) <= np.longdouble(0.3) * rate


def distance(left, right):
    """||left - right|| of sums of float32 numbers, exact up to the root."""
    parts = [fractions.Fraction(0)]
    for a, b in zip(left, right, strict=True):
        parts.append((sum(map(fractions.Fraction, a)) - sum(map(fractions.Fraction, b))) ** 2)
    return sum(parts)  # the square


def ball_cases():
    """Parameters near and far, updates short and long, of five numbers each."""
    rng, cases = np.random.default_rng(2), []
    for far in (0.0, 1e-6, 0.3, 1.0, 30.0, 1e4, 1e7, 1e12, 1e25, 1e38):
        for long in (0.0, 1e-9, 0.5, 100.0, 1e9, 1e37):
            for _ in range(3):
                cases.append((far * rng.uniform(-1, 1, 5), long * rng.normal(size=5)))
    return tuple(np.stack(part).astype(np.float32) for part in zip(*cases, strict=True))


def check_project_onto_ball(mode, center, radius=0.7):
    params, moves = ball_cases()
    tx = transforms.project_onto_ball(radius, center)
    update = lambda u, p: tx.update(u, tx.init(p), p)[0]  # noqa: E731
    out = np.asarray(MODES[mode](update)(moves, params))
    middle = np.zeros(5, np.float32) if center is None else np.asarray(center)
    unreachable = 0
    for p, u, before in zip(params, out, moves, strict=True):
        if not np.all(np.isfinite(u)):
            assert np.all(np.isnan(u))
            unreachable += 1
            assert center is not None
            assert np.linalg.norm(np.float64(p) - middle) > radius * 2.0**20
            continue
        for sums in (np.stack([p + u], 1), np.stack([p, u], 1)):
            reached = distance(sums.tolist(), middle[:, None].tolist())
            assert reached <= fractions.Fraction(radius) ** 2, (p, u, math.sqrt(reached))
        meant = np.linalg.norm(np.float64(p) + before - middle)
        if meant < radius * (1 - LOSS) - 1e-6 * np.linalg.norm(middle):
            np.testing.assert_array_equal(u, before)
        elif np.linalg.norm(np.float64(p)) < 30 * radius and np.linalg.norm(middle) < 30:
            assert math.sqrt(reached) > radius * 0.999
    assert unreachable <= len(params) // 2


def check_clip_params(mode, center, radius=0.7):
    params, moves = ball_cases()
    project = lambda p: transforms.clip_params({"w": p}, radius, center and {"w": center[0]})  # noqa: E731
    out = np.asarray(MODES[mode](project)(np.concatenate([params, moves]))["w"])
    middle = np.zeros(5, np.float32) if center is None else np.asarray(center[0])
    for row in out:
        square = distance(row[:, None].tolist(), middle[:, None].tolist())
        assert square <= fractions.Fraction(radius) ** 2, (row, math.sqrt(square))
    assert len(np.unique(out)) > 50


def check_users(mode):
    """What rests on the clip, with numbers above 2^126: an example, an update, a row."""
    rng = np.random.default_rng(3)
    huge = np.where(rng.random((4, WIDTH)) < 0.1, 2e38, 5.0).astype(np.float32)
    huge[0] = 2e38

    def gradient(row):
        loss = lambda w, batch: jnp.mean(batch @ w)  # noqa: E731
        batch = jnp.stack([jnp.zeros(WIDTH).at[0].set(5.0)] * 7 + [row])
        return cu.clipped_value_and_grad(loss, 1.0)(jnp.zeros(WIDTH), batch)[1]

    for row, grad in zip(huge, np.asarray(MODES[mode](gradient)(huge)), strict=True):
        assert exact_norm(grad) <= 1
        # Seven of the eight examples point along the first axis, with norm one.
        last = row[0] / exact_norm(row)
        np.testing.assert_allclose(grad[0], (7 + last) / 8, rtol=1e-4)

    mechanism = cu.GradientClipping(init_radius=0.1, clip_norm=1.0, learning_rate=0.1, steps=3)

    def step(row, number):
        tx = cu.noisy_sgd(mechanism, 5e-8, key=jax.random.fold_in(jax.random.key(0), number))
        return tx.update(row, tx.init(row), jnp.zeros_like(row))[0]

    for update in np.asarray(MODES[mode](step)(huge, np.arange(4))):
        assert exact_norm(update) > 0.0999
        assert exact_norm(update) <= 0.1 + 1e-6

    rows = MODES[mode](lambda row: cu.convex.clip_features(row[None], 2.0)[0])(huge)
    for row in np.asarray(rows):
        assert exact_norm(row) > 1.999
        assert exact_norm(row) <= 2


def check_swallowed(mode):
    """Noise that rounding would swallow is NaN, whatever compiles it."""
    mechanism = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=4)
    sizes = np.array([0.0, 1e-6, 0.24, 0.25, 0.49999, 0.5, 1.0, 3e38, -0.6, -0.4, np.inf, np.nan])
    sizes = sizes.astype(np.float32)
    scale = np.float32(4 * 2.0**-25)  # four spacings from 1/4 to 1/2

    def whole(param, update):
        tx = cu.noisy_sgd(mechanism, scale, key=jax.random.key(0))
        tree = {"w": update}
        return tx.update(tree, tx.init(tree), {"w": param})[0]["w"]

    def alone(param, update):
        tx = cu.transforms.add_gaussian_noise(float(scale), jax.random.key(0))
        return tx.update(update, tx.init(None), param)[0]

    models = cu.ModelClipping(
        init_radius=1.0, model_radius=1.0, clip_norm=1e30, learning_rate=1.0, steps=4
    )
    convex = cu.ProjectedNoisySGD(
        initial_distance=1.0,
        learning_rate=1.0,
        strong_convexity=0.5,
        smoothness=1.0,
        radius=1.0,
        steps=4,
    )

    def projected(mechanism, update):
        tx = cu.noisy_sgd(mechanism, scale, key=jax.random.key(0))
        zeros = jnp.zeros_like(update)
        return tx.update(update, tx.init(zeros), zeros)[0]

    spread = np.zeros((len(sizes), 5), np.float32)
    zeros = spread.copy()
    spread[:, 2] = sizes  # one large entry is enough
    carried = np.abs(sizes) < 0.5
    # Gradients that are not finite become zero before the noise.
    learned = carried | ~np.isfinite(sizes)
    for name, run, rows, expected in (
        ("large parameter", whole, (spread, zeros), carried),
        ("large parameter, noise alone", alone, (spread, zeros), carried),
        ("large update", alone, (zeros, spread), carried),
        ("large update of models", lambda x: projected(models, x), (spread,), learned),
        ("large update, convex", lambda x: projected(convex, x), (spread,), learned),
    ):
        out = np.asarray(MODES[mode](run)(*rows))
        np.testing.assert_array_equal(np.isfinite(out).all(axis=1), expected, name)
        np.testing.assert_array_equal(np.isnan(out).all(axis=1), ~expected, name)


def check_tails():
    """Noise keeps its tails: the inverse of the normal distribution at 64 random bits."""
    high = np.array([0, 0, 0, 1, 5, 1000, 2**20, 2**28, 2**31, 2**32 - 1, 2**32 - 1], np.uint32)
    low = np.array([0, 1, 8, 0, 3, 0, 1, 0, 1, 0, 2**32 - 1], np.uint32)
    drawn = np.asarray(jax.jit(normal_draws.normal_from_words)(high, low), np.float64)
    whole = high.astype(object) * 2**31 + (low >> 1).astype(object)
    exceeded = np.array([(n + 0.5) / 2**63 for n in whole])
    exact = np.where(low & 1, -1, 1) * scipy.stats.norm.isf(exceeded / 2)
    np.testing.assert_allclose(drawn, exact, rtol=1e-6, atol=1e-6)


CENTER = np.array([0.25, -3.0, 1e-3, 100.0, 0.0], np.float32)


def main():
    for mode in ("jit", "jit of vmap", "scan"):
        check_clip(mode, fast=True)
        check_norm_bound(mode)
        check_rate(mode)
        for center in (None, CENTER):
            check_project_onto_ball(mode, center)
            check_clip_params(mode, None if center is None else [center])
        check_swallowed(mode)
    check_users("jit of vmap")
    check_tails()


if __name__ == "__main__":
    main()
