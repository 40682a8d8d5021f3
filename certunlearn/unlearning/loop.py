"""The loop: project the trained model, run the noisy steps compiled, fine-tune, certify."""

import warnings

import jax
import optax
from chex import ArrayTree

from certunlearn._numerics.checks import ScalarOrSchedule
from certunlearn.mechanisms import Mechanism
from certunlearn.unlearning import (
    agreement,
    finetuning,
    interrupts,
    preparing,
    progress_bar,
    releasing,
    running,
)
from certunlearn.unlearning.data_feeds import RetainData
from certunlearn.unlearning.releasing import UnlearningResult
from certunlearn.unlearning.run_options import DEFAULTS, Finetune, LossFn, Options


def unlearn(
    loss_fn: LossFn,
    params: ArrayTree,
    retain_data: RetainData,
    mechanism: Mechanism,
    *,
    delta: float | None = None,
    batch_size: int | None = None,
    epsilon: float | None = None,
    noise_scale: ScalarOrSchedule | None = None,
    key: jax.Array | None = None,
    center: ArrayTree | None = None,
    finetune: Finetune | tuple[optax.GradientTransformation, int] | None = None,
    accountant: str | None = None,
    options: Options = DEFAULTS,
    progress: bool = True,
) -> UnlearningResult:
    """Makes a trained model forget, with a certificate (Koloskova et al., ICML 2025).

    For `GradientClipping`: projects `params` onto the mechanism's ball, runs its noisy steps on
    retain data, then optionally fine-tunes without noise; for other mechanisms, what their
    docstrings say. `PerturbedMinimizer` minimises a `ConvexLoss` on all retain data, verifies the
    gradient norm, and adds its noise. `Retraining` trains from the centre, by `finetune` alone.
    Every step is tried by its shapes first, so that what cannot work is refused
    before any noise. Ctrl-C or SIGTERM ends the run early between two steps; the result then
    certifies what was really run, and `history.state` can be resumed.

    It is `prepare`, `run_noisy_steps`, `run_finetuning` and `release` in turn, of
    `certunlearn.unlearning`, which can be called one by one.

    Args:
      loss_fn: `loss_fn(params, batch)`, the mean loss of a batch, any JAX function. With a third
        argument that has no default, or one named `key`, it gets a fresh random key at every step,
        and for every example where gradients are per example. It may return one loss for each
        example, whose mean is taken, or (loss, aux), of which aux is dropped; losses narrower than
        float32 are cast up.
      params: the trained model, and `result.params` is of the same type. A pytree of float32 or
        float64 arrays (Haiku's dicts, say), which `loss_fn` gets; a Linen `TrainState`, of which it
        gets `params`; a Flax NNX module, where it gets a module with these parameters (all
        `nnx.Param`, `nnx.LoRAParam` and the like), fresh random keys at every step, and statistics
        of a new model; an Equinox module, where it gets a module with these arrays of floats, and
        all else as it was; or a Linen variable dict with other collections, of which it gets
        `params`, which is also what comes back.
      retain_data: no forget data. A pytree of arrays with a common leading axis, in memory; or a
        source of examples, with `len(source)` and `source[i]` (a Grain `MapDataset`, a Hugging
        Face `Dataset`, a PyTorch data set, a class of yours), from which the same batches are drawn
        as from arrays; or a `Stream` of batches that are made elsewhere.
      mechanism: what the noisy steps do: any `Mechanism`, of this package or your own. With `DPSGD`
        this is the training itself, on all the data.
      delta: the certificate's delta; needed unless the mechanism is exact (0).
      batch_size: examples in a batch; for `DPSGD` that of the mechanism, for `RewindToDelete` all.
        `PerturbedMinimizer` needs one for `finetune` only.
      epsilon: the certificate's epsilon; the noise is calibrated to it. Or give
      noise_scale: standard deviation of the noise in parameter units, a number, `[steps]` numbers
        or a schedule; epsilon then follows from it.
      key: None draws keys from the operating system. A given key makes the run reproducible, for
        experiments; the certificate records which.
      center: the public centre, a model or parameters structured like `params`; zero if None. It
        must not depend on the forget set. For `Retraining` it is the public start, and needed.
      finetune: noiseless steps on retain data after the noisy ones: a `Finetune`, or the tuple
        (Optax optimizer, steps).
      accountant: see `certunlearn.epsilon`; None for the one that asks for the least noise.
      options: whatever is rarer; see `Options`.
      progress: whether to show a progress bar (needs tqdm; silently none without it).

    Returns:
      An `UnlearningResult`.

    Raises:
      TypeError: if an argument is not of the right kind.
      ValueError: if an argument is out of range, parameters are not finite or narrower than
        float32, the data is empty, the model carries other state and `recompute_state` is None, an
        optimizer cannot take the parameters, or rounding would swallow the noise.
      FloatingPointError: if a gradient is not finite and the mechanism cannot do without that step
        (naming step and batch), or the parameters are not finite after the noisy steps. Nothing
        is released.
      UnlearningFailed: if anything raises after the first noisy step: `evaluate`, fine-tuning,
        a source, a stream that ends early, memory running out. Its `state` can be resumed.
      UnlearningInterrupted: likewise, a KeyboardInterrupt, at a second Ctrl-C, or at the first one
        where nothing can be released yet.

    Guarantee:
      `certificate` states it. It covers `params` of the result (and `model_state`), nothing else:
      see `certificate.assumptions`. Fine-tuning is post-processing and costs nothing, if all that
      follows the last noisy step sees the released parameters and the retain data only. What is
      made from the trained model voids it, if the loss of fine-tuning, its optimizer or
      `recompute_state` holds it, as functions hold all that they close over: a teacher, a penalty
      or mask computed from the trained model, and the running statistics of a BatchNorm that was
      split off functionally (`nnx.split`, `variables["batch_stats"]`). With a mechanism that is
      memoryless the same holds for `loss_fn` in the noisy steps. Arrays of the trained model in
      these losses are found and refused; what was computed from them is not.

    >>> import certunlearn as cu
    >>> import jax.numpy as jnp
    >>> result = cu.unlearn(
    ...     lambda params, batch: jnp.mean((batch - params) ** 2),
    ...     jnp.ones(2),
    ...     jnp.zeros((8, 2)),
    ...     cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=3),
    ...     noise_scale=5.0,
    ...     delta=1e-5,
    ...     batch_size=4,
    ...     accountant="interpolation",
    ...     progress=False,
    ... )
    >>> bool(cu.verify(result.certificate, result.params))
    True
    """
    prepared = preparing.prepare(
        loss_fn,
        params,
        retain_data,
        mechanism,
        delta=delta,
        batch_size=batch_size,
        epsilon=epsilon,
        noise_scale=noise_scale,
        key=key,
        center=center,
        finetune=finetune,
        accountant=accountant,
        options=options,
        progress=progress,
    )
    total = prepared.stop - prepared.first
    if prepared.tuning is not None and prepared.stop == mechanism.steps:
        total += prepared.tuning.steps
    with (
        agreement.deferred_interrupts(prepared.split.leaves) as interrupted,
        progress_bar.advancing(total, progress) as advance,
    ):
        noisy = running.run_noisy_steps(prepared, interrupted=interrupted, advance=advance)
        with interrupts.carrying(lambda: running.state_of(prepared, noisy.step, noisy.carry)):
            finetuned = finetuning.run_finetuning(
                prepared, noisy, interrupted=interrupted, advance=advance
            )
            result = releasing.release(prepared, noisy, finetuned)
            if releasing.is_complete(prepared, noisy, finetuned) and interrupted():
                warnings.warn("interrupted: the run was complete by then", stacklevel=2)
    return result
