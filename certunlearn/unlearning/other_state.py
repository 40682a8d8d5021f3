"""Model state other than parameters: refused, unless the caller says how it is recomputed.

BatchNorm statistics and moving averages are functions of all the data a model ever saw,
the forget set included. Neither the original training's nor the noisy phase's may leave.
"""

from collections.abc import Callable
from typing import Any

import jax
from chex import ArrayTree

from certunlearn._numerics import batches, checks
from certunlearn.unlearning import data_feeds, inputs
from certunlearn.unlearning.model_forms import ModelForm, form_of


def checked_form(model: Any, recompute_state: Callable[..., Any] | None) -> ModelForm:
    """A model, taken apart, if nothing in it could remember data or that is recomputed.

    Raises:
      ValueError: naming the state that could.
    """
    form = form_of(model)
    if form.seen and recompute_state is None:
        raise ValueError(
            f"params is a {form.kind} that carries state besides parameters "
            f"({', '.join(form.seen)}), which remembers the forget set; pass "
            "Options(recompute_state=f), where f(params, retain_data) recomputes it from the "
            "released parameters (certunlearn.unlearning.recompute_statistics helps), or the model "
            "without it if the released one needs none"
        )
    return form


def recompute_statistics(
    update: Callable[[Any, Any], Any],
    fresh_state: ArrayTree,
    retain_data: data_feeds.RetainData,
    *,
    batch_size: int,
    passes: int | None = None,
) -> ArrayTree:
    """Recomputes running statistics on retain data, from released parameters.

    Args:
      update: `update(state, batch) -> state`, one training-mode forward pass with the *released*
        parameters that returns the new statistics; compiled here.
      fresh_state: statistics as freshly initialised; never those of the original model or of the
        noisy phase.
      retain_data: as `unlearn` takes it. Of a `Stream` every pass reads epoch 0.
      batch_size: examples in a batch; batches are taken in order, a remainder is left out.
      passes: how often to go through the data; by default as often as 500 updates take, after
        which a moving average of momentum 0.99 keeps less than 1% of where it started.

    Returns:
      The recomputed state.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if the data is empty or the batch larger than the data.

    Guarantee:
      The result is a function of the released parameters and the retain data only, so it is free
      post-processing: the certificate still holds with it.

    >>> import jax.numpy as jnp
    >>> data = jnp.arange(8.0)
    >>> average = lambda state, batch: 0.9 * state + 0.1 * batch.mean()
    >>> print(f"{recompute_statistics(average, 0.0, data, batch_size=8):.4f}")
    3.5000
    """
    inputs.function("update", update, "f(state, batch) -> state")
    feed = data_feeds.feed_of(retain_data)
    count = feed.size // batches.check_batch_size(batch_size, feed.size)
    passes = -(-500 // count) if passes is None else checks.positive_int("passes", passes)
    step = jax.jit(update)
    state = fresh_state
    for _ in range(passes):
        for batch in feed.in_order(batch_size):
            state = step(state, batch)
    return state
