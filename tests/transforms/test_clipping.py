"""`clip_by_global_norm`: counts, schedules, dtypes and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transform_helpers import exact_norm

from certunlearn import transforms


def test_clip_counts_and_follows_a_schedule():
    tx = transforms.clip_by_global_norm(lambda count: 1.0 / (1 + count))
    state = tx.init(jnp.zeros(4))
    gradients = [jnp.full(4, 9.0), jnp.full(4, jnp.nan), jnp.full(4, 1e-3), jnp.full(4, jnp.inf)]
    norms = []
    for gradient in gradients:
        updates, state = jax.jit(tx.update)(gradient, state)
        norms.append(exact_norm(updates))
    np.testing.assert_allclose(norms, [1.0, 0.0, 2e-3, 0.0], rtol=1e-4)
    assert norms[0] <= 1.0
    assert (int(state.count), int(state.clipped), int(state.nonfinite)) == (4, 1, 2)
    assert all(leaf.dtype == jnp.int32 for leaf in state)


def test_bfloat16_gradients_are_clipped_in_float32():
    tx = transforms.clip_by_global_norm(0.1)
    updates, _ = tx.update(jnp.full(1001, 3, jnp.bfloat16), tx.init(None))
    assert updates.dtype == jnp.float32
    assert 0.0999 < exact_norm(updates) <= 0.1
    # What rounding back would have done.
    assert exact_norm(updates.astype(jnp.bfloat16)) != exact_norm(updates)


def test_bad_arguments_of_clip():
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="clip_norm"):
            transforms.clip_by_global_norm(bad)
