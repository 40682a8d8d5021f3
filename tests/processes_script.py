"""One process of a run over several; `tests/unlearning/test_processes.py` starts them.

Arguments: number of this process, number of processes, port, folder, and what to do. With one
process all is done on its devices alone.
"""

import json
import os
import pathlib
import signal
import sys
import time

import jax

NUMBER, COUNT, PORT, FOLDER, TASK = sys.argv[1:]
if int(COUNT) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{PORT}", int(COUNT), int(NUMBER))

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import certunlearn as cu  # noqa: E402
from certunlearn.unlearning import orbax_checkpoints  # noqa: E402

MESH = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
MECHANISM = cu.GradientClipping(init_radius=2.0, clip_norm=1.0, learning_rate=0.1, steps=3)
RUN = {"noise_scale": 0.5, "delta": 1e-5, "accountant": "interpolation", "progress": False}
ROWS = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
TARGETS = ROWS @ np.arange(8, dtype=np.float32)
KEY = jax.random.key(3)


def placed(array, *spec):
    sharding = NamedSharding(MESH, P(*spec))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def loss(params, batch):
    rows, targets = batch
    return jnp.mean((rows @ params["w"] + params["b"] - targets) ** 2)


def model():
    return {"w": placed(np.ones(8, np.float32), "data"), "b": placed(np.zeros((), np.float32))}


def own_loop():
    """The user's own steps; every process gives the same key."""
    tx = cu.noisy_sgd(MECHANISM, 0.5, key=KEY)
    params = cu.clip_params(model(), MECHANISM.init_radius)
    state, batch = tx.init(params), (placed(ROWS, "data"), placed(TARGETS, "data"))

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(MECHANISM.steps):
        params, state = step(params, state, batch)
    certificate = cu.certify(MECHANISM, noise_scale=0.5, delta=1e-5, params=params, state=state)
    return params, certificate


def unlearned(data, **more):
    return cu.unlearn(loss, model(), data, MECHANISM, batch_size=8, **RUN, **more)


def refused(function):
    try:
        function()
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


def report():
    data = (placed(ROWS, "data"), placed(TARGETS, "data"))
    params, certificate = own_loop()
    out = {"own loop": certificate.to_json(), "verified": [bool(cu.verify(certificate, params))]}
    result = unlearned(data, key=KEY, finetune=(optax.adam(0.01), 2))
    out["unlearn"] = result.certificate.to_json()
    out["losses"] = result.history.losses.tolist()
    out["kept"] = list(result.params["w"].sharding.spec)
    out["verified"].append(bool(cu.verify(result.certificate, result.params)))
    cu.certificates.save_params(pathlib.Path(FOLDER) / f"{COUNT}.npz", result.params)
    # Arrays of the host, the same in all processes; keys that nobody gave.
    spread = cu.Options(batch_sharding=NamedSharding(MESH, P("data")))
    result = unlearned((ROWS, TARGETS), options=spread)
    out["drawn keys"] = result.certificate.to_json()
    out["verified"].append(bool(cu.verify(result.certificate, result.params)))
    if int(COUNT) > 1:
        state = unlearned(data, key=KEY, options=cu.Options(stop_after=1)).history.state
        path = pathlib.Path(FOLDER) / f"{NUMBER}.private.npz"
        out["one file of pieces"] = refused(lambda: cu.unlearning.save_state(path, state))
        resumed = unlearned(data, options=cu.Options(resume=state), finetune=(optax.adam(0.01), 2))
        out["resumed"] = resumed.certificate.to_json()
        other = jax.random.key(int(NUMBER))
        out["other keys"] = refused(lambda: unlearned(data, key=other))
        options = cu.Options(save_every=1, save_to=str(path))
        out["saves to a file"] = refused(lambda: unlearned(data, key=KEY, options=options))
        local = cu.unlearn(loss, {"w": np.ones(8), "b": np.zeros(())}, (ROWS, TARGETS), MECHANISM,
                           batch_size=8, key=other, **RUN)  # fmt: skip
        out["local"] = local.certificate.params_digest
    return out


TUNED = {"finetune": (optax.adam(0.01), 2)}


def states(way):
    return pathlib.Path(FOLDER) / f"{way}.private"


def killed(torn=False):
    """Saves after every step, and waits to be killed after the second.

    If torn, the second process dies by itself, while the state of the second step is written.
    """
    saver, looks = orbax_checkpoints.Saver(states("torn" if torn else "killed")), []

    def evaluate(params):
        looks.append(1)
        if len(looks) == 3:
            if torn and NUMBER == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            if not torn:
                saver.wait()
            pathlib.Path(FOLDER, f"{TASK}-{NUMBER}").touch()
            time.sleep(600)

    options = cu.Options(save_every=1, save_to=saver, evaluate=evaluate, evaluate_every=1)
    unlearned((placed(ROWS, "data"), placed(TARGETS, "data")), key=KEY, options=options, **TUNED)


def goes_on(states):
    """Goes on from what killed processes saved, read in pieces and whole."""
    data, out = (placed(ROWS, "data"), placed(TARGETS, "data")), {}
    for spread in (False, True):
        state = orbax_checkpoints.restore_state(states, spread=spread)
        out["step"] = state.step
        pieces = [leaf for leaf in state.leaves if leaf.shape == (8,)]
        out[f"in pieces, {spread}"] = [
            isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in pieces
        ]
        result = unlearned(data, options=cu.Options(resume=state), **TUNED)
        out[f"resumed, {spread}"] = result.certificate.params_digest
    with orbax_checkpoints.Saver(states) as saver:
        options = cu.Options(resume=state, save_every=1, save_to=saver)
        unlearned(data, options=options)
        out["refused"] = refused(lambda: saver(state))
    out["last"] = orbax_checkpoints.restore_state(states).step
    return out


def go_on():
    """After each of the two ways to die, and what a run that nobody killed comes to."""
    data = (placed(ROWS, "data"), placed(TARGETS, "data"))
    out = {"whole": unlearned(data, key=KEY, **TUNED).certificate.params_digest}
    return out | {way: goes_on(states(way)) for way in ("killed", "torn")}


if __name__ == "__main__":
    TASKS = {"report": report, "torn": lambda: killed(True), "go on": go_on}
    pathlib.Path(FOLDER, f"{COUNT}-{NUMBER} {TASK}.json").write_text(json.dumps(TASKS[TASK]()))
    if TASK == "report" and int(COUNT) > 1:
        TASK = "killed"
        killed()
