"""Runs on eight devices; `tests/unlearning/test_devices.py` starts this and reads what it prints.

A network whose parameters and batches are spread over all devices (FSDP), on a mesh with the kind
of axes that the argument names: auto or explicit.
"""

import contextlib
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import certunlearn as cu
from certunlearn.unlearning import Stream, compiled_steps

EXPLICIT = sys.argv[1] == "explicit"
KIND = AxisType.Explicit if EXPLICIT else AxisType.Auto
MESH = jax.make_mesh((8,), ("data",), axis_types=(KIND,))
WHOLE = NamedSharding(MESH, P())
ROWS = NamedSharding(MESH, P("data"))
KEY = jax.random.key(0)
MECHANISM = cu.GradientClipping(
    init_radius=5.0, clip_norm=1.0, learning_rate=0.1, weight_decay=0.01, steps=3
)
RUN = {"noise_scale": 0.5, "delta": 1e-5, "key": KEY, "accountant": "interpolation"}
RNG = np.random.default_rng(0)
# One leaf that is spread, and one that every device has: each leaf more makes programs longer.
MODEL = {
    "w1": RNG.normal(size=(16, 24)).astype(np.float32),
    "w2": RNG.normal(size=(24, 3)).astype(np.float32),
}
SPECS = {"w1": P("data", None), "w2": P()}
PLACES = {name: NamedSharding(MESH, spec) for name, spec in SPECS.items()}
DATA = (RNG.normal(size=(64, 16)).astype(np.float32), RNG.normal(size=(64, 3)).astype(np.float32))
BATCH = jax.tree.map(lambda x: x[:16], DATA)


def squared(params, batch):
    return jnp.mean((jnp.tanh(batch[0] @ params["w1"]) @ params["w2"] - batch[1]) ** 2)


def loss(params, batch):
    """As FSDP has it: each device has all parameters for a moment, and its own examples."""
    gathered = jax.sharding.reshard if EXPLICIT else jax.lax.with_sharding_constraint
    return squared(jax.tree.map(lambda p: gathered(p, WHOLE), params), batch)


def spread_model():
    return jax.device_put(MODEL, PLACES)


def on_mesh():
    return jax.set_mesh(MESH) if EXPLICIT else contextlib.nullcontext()


def kept(params):
    """Whether all still lies where it lay."""
    return all(params[n].sharding.is_equivalent_to(PLACES[n], params[n].ndim) for n in MODEL)


def farthest(a, b):
    return max(float(np.max(np.abs(np.asarray(a[n]) - np.asarray(b[n])))) for n in MODEL)


def collectives(compiled):
    """Kind and result of every collective of a program, sorted."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    pattern = re.compile(rf"= (.*?) ({kinds})(?:-start)?\(")
    found = map(pattern.search, compiled.as_text().splitlines())
    return sorted(f"{match[2]} {match[1]}" for match in found if match)


def stepper(tx):
    def step(params, state, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def own_loop():
    """The user's own jitted steps: what they communicate, and what comes out."""
    noisy, plain = cu.noisy_sgd(MECHANISM, 0.5, key=KEY), optax.sgd(0.1)
    params, batch = spread_model(), jax.device_put(BATCH, (ROWS, ROWS))
    programs = {}
    for name, tx in {"noisy": noisy, "plain": plain}.items():
        jitted = jax.jit(stepper(tx), donate_argnums=(0, 1))
        programs[name] = jitted.lower(params, tx.init(params), batch).compile()
    out = {name: collectives(program) for name, program in programs.items()}
    params = cu.clip_params(params, MECHANISM.init_radius)
    out["start kept"] = kept(params)
    # The start, clipped, on one device and on eight.
    one = {name: jnp.asarray(np.asarray(leaf)) for name, leaf in params.items()}
    out["clip differs by"] = farthest(params, cu.clip_params(MODEL, MECHANISM.init_radius))
    states = noisy.init(params), noisy.init(one)
    # With no gradient an update is noise, and decay of a parameter that is zero.
    zeros = [jax.tree.map(jnp.zeros_like, tree) for tree in (params, one)]
    updates = [
        jax.jit(noisy.update)(zero, state, zero)[0]
        for zero, state in zip(zeros, states, strict=True)
    ]
    out["noise differs by"] = farthest(*updates)
    step = jax.jit(stepper(noisy), donate_argnums=(0, 1))
    state = states[0]
    for _ in range(2):
        params, state, _ = step(params, state, batch)
    out["compilations"] = step._cache_size()
    out["kept"] = kept(params)

    alone = states[1]
    single = jax.jit(
        lambda params, state: noisy.update(jax.grad(squared)(params, BATCH), state, params)
    )
    for _ in range(2):
        updates, alone = single(one, alone)
        one = optax.apply_updates(one, updates)
    out["differs by"] = farthest(params, one)
    return out


def run(loss, params, data, mechanism=MECHANISM, **more):
    return cu.unlearn(loss, params, data, mechanism, batch_size=16, progress=False, **RUN, **more)


def looked_at(result, alone):
    return {
        "kept": kept(result.params),
        "differs by": farthest(result.params, alone.params),
        "verified": bool(cu.verify(result.certificate, result.params)),
    }


def unlearn():
    """`unlearn` on arrays that are spread, and from there on, as far as the kind of axes allows."""
    tuned = {"finetune": (optax.adam(0.01), 2), "center": jax.tree.map(lambda x: 0.1 * x, MODEL)}
    alone, data = run(squared, MODEL, DATA, **tuned), jax.device_put(DATA, (ROWS, ROWS))
    with on_mesh():
        out = {"arrays": looked_at(run(loss, spread_model(), data, **tuned), alone)}
        compiled_before = compiled_steps_kept()
        stopped = run(loss, spread_model(), data, options=cu.Options(stop_after=2), **tuned)
        more = {key: value for key, value in RUN.items() if key != "key"}
        options = cu.Options(resume=stopped.history.state)
        resumed = cu.unlearn(loss, spread_model(), data, MECHANISM, batch_size=16, options=options,
                             progress=False, **more, **tuned)  # fmt: skip
        out["resumed"] = looked_at(resumed, alone)
        out["compiled anew"] = compiled_steps_kept() - compiled_before
        batches = [jax.tree.map(lambda x: x[i : i + 16], DATA) for i in range(0, 64, 16)]  # noqa: B023
        stream = Stream(batches, size=64, batch_size=16)
        spread = cu.Options(batch_sharding=ROWS)
        whole = run(squared, MODEL, stream)
        out["stream"] = looked_at(run(loss, spread_model(), stream, options=spread), whole)
    return out


def compiled_steps_kept():
    kept = compiled_steps.kept_steps._kept.values()
    return sum(entry.function._cache_size() for entry in kept)


def other_ways():
    """Clipped examples, samples, frozen leaves; data on the host, copied or divided."""
    out = {}
    # On explicit axes an example's gradient cannot be spread over the axis of the examples.
    model = MODEL if EXPLICIT else spread_model()
    example_loss = squared if EXPLICIT else loss
    frozen = {"w1": False, "w2": True}
    whole, clipped, partly = (
        run(squared, MODEL, DATA, options=cu.Options(**given))
        for given in ({}, {"per_example": True}, {"frozen": frozen})
    )
    for name, given, params, spread_loss, alone in (
        ("per example", {"per_example": True}, model, example_loss, clipped),
        ("microbatches", {"per_example": True, "microbatch_size": 8}, model, example_loss, clipped),
        ("accumulated", {"microbatch_size": 8}, spread_model(), loss, whole),
        ("frozen", {"frozen": frozen}, spread_model(), loss, partly),
        ("copied parameters", {}, MODEL, loss, whole),
    ):
        with on_mesh():
            options = cu.Options(**given, batch_sharding=ROWS)
            out[name] = looked_at(run(spread_loss, params, DATA, options=options), alone)
    with on_mesh():
        out["copied batches"] = looked_at(run(loss, spread_model(), DATA), whole)
    sampled = cu.DPSGD(
        clip_norm=1.0, learning_rate=0.1, steps=2, sampling_rate=0.25, batch_size=16, deletions=1
    )
    more = {"noise_scale": 0.5, "delta": 1e-5, "key": KEY, "batch_size": 16, "progress": False}
    options = cu.Options(microbatch_size=16)
    alone = cu.unlearn(squared, MODEL, DATA, sampled, **more, options=options)
    with on_mesh():
        options = cu.Options(microbatch_size=16, batch_sharding=ROWS)
        result = cu.unlearn(example_loss, model, DATA, sampled, **more, options=options)
        out["samples"] = looked_at(result, alone)
    return out


def refused():
    """What cannot be divided, or lies elsewhere."""
    out = {}
    half = jax.make_mesh((4,), ("data",), axis_types=(KIND,), devices=jax.devices()[:4])
    cases = {
        "size": {"data": jax.tree.map(lambda x: x[:60], DATA), "batch": 12, "options": ROWS},
        "devices": {"data": DATA, "batch": 16, "options": NamedSharding(half, P("data"))},
    }
    for name, case in cases.items():
        try:
            cu.unlearn(loss, spread_model(), case["data"], MECHANISM, batch_size=case["batch"],
                       options=cu.Options(batch_sharding=case["options"]), **RUN)  # fmt: skip
            out[name] = ""
        except ValueError as error:
            out[name] = str(error)
    return out


if __name__ == "__main__":
    checks = [globals()[name] for name in sys.argv[2].split(",")]
    print(json.dumps({check.__name__: check() for check in checks}))
