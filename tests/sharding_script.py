"""Checks on eight devices; `tests/test_sharding.py` runs this file and reads what it prints."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import certunlearn as cu

KEY = jax.random.key(0)
MESH = Mesh(np.array(jax.devices()), ("x",))
GRID = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
MECHANISM = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=3)
TX = cu.noisy_sgd(MECHANISM, 0.5, key=KEY)


def shard_map(f, **options):
    return jax.jit(jax.shard_map(f, **options))


def exact_norm(tree):
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return float(np.linalg.norm(np.concatenate(leaves)))


def step(params, gradient):
    return TX.update(gradient, TX.init(params), params)[0]


def quiet_step(params, gradient):
    tx = cu.noisy_sgd(MECHANISM, 1e-9, key=KEY)
    return tx.update(gradient, tx.init(params), params)[0]


def equal_pieces(rows):
    """How many pairs of rows have a number in common in the same place."""
    rows = np.asarray(rows)
    return sum(bool(np.any(rows[i] == rows[j])) for i in range(len(rows)) for j in range(i))


def pieces():
    """In shard_map: one clip over all pieces, independent noise, equal noise for copies."""
    both = shard_map(step, mesh=MESH, in_specs=(P("x"), P("x")), out_specs=P("x"))
    zeros = {"w": jnp.zeros((8, 300))}
    out = {"noise": equal_pieces(both(zeros, zeros)["w"])}
    # The update is a constant, the same on all devices; the parameters are pieces.
    constant = shard_map(
        lambda p: step(p, jax.tree.map(jnp.zeros_like, {"w": jnp.zeros((1, 300))})),
        mesh=MESH,
        in_specs=P("x"),
        out_specs=P("x"),
    )
    out["noise on a constant"] = equal_pieces(constant(zeros)["w"])
    last = cu.OutputPerturbation(init_radius=1.0)
    tx = cu.noisy_sgd(last, 0.5, key=KEY)
    only_noise = shard_map(
        lambda p: tx.update(p, tx.init(p), p)[0], mesh=MESH, in_specs=P("x"), out_specs=P("x")
    )
    out["noise alone"] = equal_pieces(only_noise(zeros)["w"])

    def mixed(a, b):
        new = step({"a": a, "b": b}, {"a": a, "b": b})
        return new["a"], new["b"]

    a, b = shard_map(
        mixed,
        mesh=GRID,
        in_specs=(P("x", "y"), P("y")),
        out_specs=(P("x", "y"), P("y")),
    )(jnp.zeros((4, 200)), jnp.zeros(200))
    a = np.asarray(a).reshape(4, 2, 100).reshape(8, 100)
    out["noise on a grid"] = equal_pieces(np.concatenate([a, np.asarray(b).reshape(2, 100)]))

    gradient = {"w": jnp.ones((8, 300)) * jnp.linspace(1e-3, 3e37, 8)[:, None]}
    moved = shard_map(quiet_step, mesh=MESH, in_specs=(P("x"), P("x")), out_specs=P("x"))(
        zeros, gradient
    )
    out["clip"] = exact_norm(moved)
    np.testing.assert_allclose(moved["w"], quiet_step(zeros, gradient)["w"], atol=1e-7)
    # A NaN on one device zeroes the whole gradient.
    spoilt = {"w": gradient["w"].at[3, 5].set(jnp.nan)}
    moved = shard_map(quiet_step, mesh=MESH, in_specs=(P("x"), P("x")), out_specs=P("x"))(
        zeros, spoilt
    )
    out["clip of a NaN"] = exact_norm(moved)
    # Pieces of one leaf, beside a leaf of which all devices hold a copy.
    joint = shard_map(
        lambda a, b: cu.clip_by_global_norm(1.0).update(
            {"a": a, "b": b}, cu.clip_by_global_norm(1.0).init(None)
        )[0],
        mesh=MESH,
        in_specs=(P("x"), P()),
        out_specs={"a": P("x"), "b": P()},
    )(jnp.ones(64), jnp.full(36, 2.0))
    out["joint clip"] = exact_norm(joint)
    params = shard_map(
        lambda p: cu.clip_params(p, 2.0, jnp.ones_like(p)),
        mesh=MESH,
        in_specs=P("x"),
        out_specs=P("x"),
    )(jnp.linspace(-40, 40, 64))
    out["clip_params"] = float(np.linalg.norm(np.float64(params) - 1))
    ball = cu.transforms.project_onto_ball(0.5)
    moved = shard_map(
        lambda u, p: ball.update(u, ball.init(p), p)[0],
        mesh=MESH,
        in_specs=(P("x"), P("x")),
        out_specs=P("x"),
    )(jnp.ones(64), jnp.ones(64))
    out["project_onto_ball"] = exact_norm(jnp.ones(64) + moved)
    return out


def copies():
    """Replicas stay in step: under pmap, with or without a name, and in shard_map."""
    one = {"w": jnp.zeros(300)}
    expected = np.asarray(step(one, one)["w"])
    stack = {"w": jnp.zeros((8, 300))}
    out = {}
    named = jax.pmap(lambda p, g: step(p, jax.lax.pmean(g, "i")), axis_name="i")
    for name, f in {"pmap": jax.pmap(step), "named pmap": named}.items():
        rows = np.asarray(f(stack, stack)["w"])
        out[name] = bool((rows == rows[0]).all()) and bool(np.allclose(rows[0], expected))
    replicated = shard_map(
        lambda p, x: step(p, {"w": jnp.zeros(300) + 0 * jax.lax.psum(jnp.sum(x), "x")}),
        mesh=MESH,
        in_specs=(P(), P("x")),
        out_specs=P(),
    )
    out["shard_map"] = bool(np.allclose(replicated(one, jnp.ones(8))["w"], expected))
    return out


def unchecked():
    """What JAX does not keep track of is refused."""
    out = {}
    calls = {
        "noisy_sgd": step,
        "clip": lambda p, g: cu.clip_by_global_norm(1.0).update(
            g, cu.clip_by_global_norm(1.0).init(p)
        )[0],
        "noise": lambda p, g: cu.transforms.add_gaussian_noise(1.0, KEY).update(
            g, cu.transforms.add_gaussian_noise(1.0, KEY).init(p)
        )[0],
        "clip_params": lambda p, g: cu.clip_params(p, 1.0),
        "inside jit": jax.jit(step),
    }
    for name, f in calls.items():
        loose = shard_map(
            f, mesh=MESH, in_specs=(P("x"), P("x")), out_specs=P("x"), check_vma=False
        )
        try:
            loose({"w": jnp.zeros((8, 3))}, {"w": jnp.zeros((8, 3))})
            out[name] = ""
        except ValueError as error:
            out[name] = str(error)
    # Traced once in a pmap, a jitted function could be used again where arrays are pieces.
    try:
        jax.pmap(jax.jit(step), axis_name="x")({"w": jnp.zeros((8, 3))}, {"w": jnp.zeros((8, 3))})
        out["jit inside pmap"] = ""
    except ValueError as error:
        out["jit inside pmap"] = str(error)
    return out


def examples():
    """Rows on several devices are not to be clipped together."""
    out = {}
    loss = lambda w, batch: jnp.mean(batch @ w)  # noqa: E731
    gradient = cu.clipped_value_and_grad(loss, 1.0)
    calls = {
        "gradient": lambda rows: gradient(jnp.zeros(3), rows)[1],
        "features": lambda rows: cu.convex.clip_features(rows, 1.0),
        "scales": cu.convex.linearized(lambda p, x: x @ p, jnp.ones((3, 2)), radius=1.0).scales,
    }
    for name, f in calls.items():
        try:
            shard_map(f, mesh=MESH, in_specs=P("x"), out_specs=P("x"))(jnp.ones((16, 3)))
            out[name] = ""
        except ValueError as error:
            out[name] = str(error)
    return out


def sharded():
    """Under jit: the noise of one device, bit for bit, one clip, and no leaf gathered."""
    rng = np.random.default_rng(0)
    shapes = {"wide": (64, 320), "long": (8 * 509,), "odd": (7, 5)}
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    gradient = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = cu.transforms.add_gaussian_noise(0.5, KEY)

    def both(params, gradient, zeros):
        clipped = cu.clip_by_global_norm(1.0)
        return (
            tx.update(clipped.update(gradient, clipped.init(params))[0], tx.init(params))[0],
            tx.update(zeros, tx.init(params))[0],
            clipped.update(gradient, clipped.init(params))[0],
        )

    _, plain, alone = jax.jit(both)(params, gradient, zeros)
    out = {"gathers": [], "noise": [], "clip": []}
    for wide in (P(None, ("x", "y")), P("x", "y")):
        specs = {"wide": wide, "long": P(("x", "y")), "odd": P()}
        shardings = {name: NamedSharding(GRID, spec) for name, spec in specs.items()}
        placed = [jax.device_put(tree, shardings) for tree in (params, gradient, zeros)]
        compiled = jax.jit(both, out_shardings=(shardings,) * 3).lower(*placed).compile()
        for line in compiled.as_text().splitlines():
            if "all-gather" in line or "all-to-all" in line:
                out["gathers"].append(f"{wide}: {line.strip()[:90]}")
        _, noise, clipped = compiled(*placed)
        equal = [bool((np.asarray(noise[n]) == np.asarray(plain[n])).all()) for n in shapes]
        out["noise"].append(all(equal))
        out["clip"].append(exact_norm(clipped))
        for name in shapes:
            np.testing.assert_allclose(clipped[name], alone[name], atol=1e-6)
    return out


def swallowed():
    """Noise that rounding would swallow in one place: NaN in all of a sharded leaf."""
    tx = cu.transforms.add_gaussian_noise(1e-6, KEY)
    params, zeros = jnp.zeros(16).at[5].set(1e3), jnp.zeros(16)
    both = lambda update, params: tx.update(update, tx.init(None), params)[0]  # noqa: E731
    placed = [jax.device_put(x, NamedSharding(MESH, P("x"))) for x in (zeros, params)]
    pieces = shard_map(both, mesh=MESH, in_specs=(P("x"), P("x")), out_specs=P("x"))
    return {
        "jit": np.isnan(jax.jit(both)(*placed)).tolist(),
        "pieces": np.isnan(pieces(zeros, params)).tolist(),
    }


def explicit():
    """On a mesh whose axes are part of the types."""
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    rows = np.random.default_rng(0).normal(size=(64, 320)).astype(np.float32)
    clip = cu.clip_by_global_norm(1.0)
    with jax.set_mesh(jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)):
        placed = jax.device_put(rows, P("x", "y"))
        out = jax.jit(lambda leaf: clip.update(leaf, clip.init(leaf))[0])(placed)
        return {"kept": jax.typeof(out) == jax.typeof(placed), "clip": exact_norm(out)}


def everywhere():
    """Noise on a leaf sharded along each axis: the bits of one device, nothing but one maximum."""
    tx, shape = cu.transforms.add_gaussian_noise(0.5, KEY), (16, 24, 8)
    zeros = np.zeros(shape, np.float32)
    noise = lambda update, params: tx.update(update, tx.init(None), params)[0]  # noqa: E731
    expected = np.asarray(noise(zeros, zeros))
    specs = [P("x"), P(None, "x"), P(None, None, "x"), P("y", "x"), P(None, ("x", "y")), P()]
    out = {}
    for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
        for spec in specs:
            with jax.set_mesh(mesh):
                place = NamedSharding(mesh, spec)
                placed = jax.device_put(zeros, place)
                compiled = jax.jit(noise, out_shardings=place).lower(placed, placed).compile()
                moves = [m for m in MOVES if f" {m}(" in compiled.as_text()]
                # A program of its own for eager mode, in which the type says what is sharded.
                equal = [np.array_equal(f(placed, placed), expected) for f in (compiled, noise)]
                kept = jax.typeof(noise(placed, placed)) == jax.typeof(placed)
            out[f"{kind.name} {spec}"] = {"equal": all(equal), "kept": kept, "moves": moves}
    return out


MOVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter", "gather", "while")


if __name__ == "__main__":
    checks = (pieces, copies, unchecked, examples, sharded, swallowed, explicit, everywhere)
    print(json.dumps({check.__name__: check() for check in checks}))
