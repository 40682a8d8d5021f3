"""`decay_toward`: schedules, the centre and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certunlearn import transforms


def test_decay_by_schedule_toward_a_center():
    center = {"w": jnp.array([1.0, 2.0])}
    params = {"w": jnp.array([3.0, 0.0])}
    tx = transforms.decay_toward(lambda count: 0.5 * count, center)
    state = tx.init(params)
    for step in range(3):
        updates, state = jax.jit(tx.update)({"w": jnp.ones(2)}, state, params)
        expected = 1 + 0.5 * step * (params["w"] - center["w"])
        np.testing.assert_allclose(updates["w"], expected)
    updates, _ = transforms.decay_toward(0.5).update(params, state, params)
    np.testing.assert_allclose(updates["w"], 1.5 * params["w"])


def test_bad_arguments_of_decay():
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="weight_decay"):
            transforms.decay_toward(bad)
    tx = transforms.decay_toward(0.1, {"w": jnp.ones(2)})
    with pytest.raises(ValueError, match="structure"):
        tx.init({"v": jnp.ones(2)})
    with pytest.raises(ValueError, match="shape"):
        tx.init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="needs params"):
        tx.update({"w": jnp.ones(2)}, tx.init({"w": jnp.ones(2)}))
