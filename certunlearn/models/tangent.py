"""Networks linearised at public weights: their losses are convex, with known constants.

The tangent model is linear in the change w of the weights. Each example's features are its Jacobian
at the public weights, scaled down to a norm of at most the radius.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from chex import ArrayTree
from jax.typing import ArrayLike

from certunlearn._numerics import checks, norms, parallel, trees
from certunlearn.models import loss as losses
from certunlearn.models.loss import ConvexLoss


@dataclasses.dataclass(frozen=True, eq=False)
class Linearized:
    """A tangent model, made by `linearized`, whose arguments it holds. It is a pytree, for jit.

    Attributes:
      apply_fn: the network, `apply_fn(params, inputs)`.
      public_params: p0, where the network is linearised.
      radius: bound on the norm of each example's tangent features.
    """

    apply_fn: Callable[..., jax.Array]
    public_params: ArrayTree
    radius: float

    def zeros(self) -> ArrayTree:
        """The tree w = 0, where learning starts: the public network."""
        return jax.tree.map(jnp.zeros_like, self.public_params)

    def merge(self, w: ArrayTree) -> ArrayTree:
        """The weights p0 + w, of the *tangent* model. The network is another function of them."""
        return jax.tree.map(jnp.add, self.public_params, self._like_params(w))

    def scales(self, inputs: ArrayTree, microbatch_size: int | None = None) -> jax.Array:
        """The scales s(x) = min(1, radius / ||J(x)||_F), to compute once and keep with the data.

        Args:
          inputs: an array, or pytree of arrays, with a leading axis of examples.
          microbatch_size: examples worked on at once; None is one. Memory is that many gradients,
            never a Jacobian; time is one backward pass for each example and output. Under `jit`,
            repeated calls compile once.

        Returns:
          float32 `[batch]`, each from its own example alone; 0 where the outputs or the Jacobian
          are not finite.

        Raises:
          TypeError: if `microbatch_size` is not a whole number.
          ValueError: if it is below 1, `inputs` is empty or ragged, or the outputs misshapen;
            inside `shard_map`, if the inputs are spread over devices.

        Guarantee:
          s(x) ||J(x)||_F <= radius in exact arithmetic on the rows of J that reverse mode returns:
          the norm is replaced by an upper bound (`norms.norm_bound`, of the rows' bounds), the
          radius by a float32 below it, and the quotient by 1 - 4 eps times it, more than its
          three roundings; below the normal numbers it is 0, as rounding is not relative there.
          Rounding *inside* the network is not covered: where float32 products are shortened, use
          `jax.default_matmul_precision("highest")`, or choose a radius that is smaller by that
          rounding. Overflow in `apply` alone is not covered either: bound the inputs.
        """
        if microbatch_size is not None:
            microbatch_size = checks.positive_int("microbatch_size", microbatch_size)
        _batch_size(inputs)
        parallel.check_whole("inputs", inputs)
        radius = float(np.float32(self.radius * (1 - 1e-7)))  # the unit roundoff is 6e-8
        limits = jnp.finfo(jnp.float32)

        def scale(example: ArrayTree) -> jax.Array:
            one = jax.tree.map(lambda leaf: leaf[None], example)
            outputs, pull = jax.vjp(lambda p: self._outputs(p, one, 1).ravel(), self.public_params)

            def row_norm(index: jax.Array) -> jax.Array:
                seed = (jnp.arange(outputs.size) == index).astype(outputs.dtype)
                return norms.norm_bound(pull(seed))

            bound = norms.norm_bound(jax.lax.map(row_norm, jnp.arange(outputs.size)))
            quotient = radius / jnp.maximum(bound, radius) * (1 - 4 * limits.eps)
            quotient = jnp.where(quotient >= limits.tiny, quotient, 0)
            finite = jnp.isfinite(bound) & jnp.all(jnp.isfinite(outputs))
            return jnp.where(finite, jnp.where(bound <= radius, 1, quotient), 0).astype(jnp.float32)

        return jax.lax.map(scale, jax.tree.map(jnp.asarray, inputs), batch_size=microbatch_size)

    def apply(self, w: ArrayTree, inputs: ArrayTree, scales: ArrayLike) -> jax.Array:
        """The outputs f(p0, x) + s(x) J(x) w, at about the cost of two runs of the network.

        Args:
          w: a pytree like `public_params`; the outputs are affine in it, and differentiable.
          inputs: an array, or pytree of arrays, with a leading axis of examples.
          scales: `[batch]`, what `scales` returned for these inputs. Others void the constants.

        Returns:
          Outputs in float32 or wider. If a leaf of `w` is float64, the network runs at float64
          copies of the public weights and inputs, which are the same numbers: where `apply_fn`
          computes in the dtype of its parameters, rounding is then that of float64. An example of
          scale 0 has outputs 0, whatever w: its inputs,
          maybe NaN, are replaced by zeros and do not spoil the batch's gradient.

        Raises:
          ValueError: if `w` is not like `public_params`, `inputs` is empty or ragged, or `scales`
            or the network's outputs have the wrong shape.
        """
        size = _batch_size(inputs)
        if jnp.shape(scales) != (size,):
            raise ValueError(f"scales must have shape ({size},), got {jnp.shape(scales)}")
        scales = jnp.asarray(scales, jnp.float32)
        usable = scales > 0
        keep = jax.vmap(lambda flag, value: jnp.where(flag, value, jnp.zeros_like(value)))
        inputs = jax.tree.map(lambda leaf: keep(usable, jnp.asarray(leaf)), inputs)
        center, w = self.public_params, self._like_params(w)
        if any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(w)):
            center, w, inputs = (jax.tree.map(_widened, tree) for tree in (center, w, inputs))
        outputs, slope = jax.jvp(lambda p: self._outputs(p, inputs, size), (center,), (w,))
        return keep(usable, outputs + jax.vmap(jnp.multiply)(scales.astype(slope.dtype), slope))

    def features(
        self, inputs: ArrayTree, scales: ArrayLike, microbatch_size: int | None = None
    ) -> jax.Array:
        """The tangent features s(x) J(x) of a network with one output, for a linear model on them.

        Such a model's outputs are s(x) J(x) w, without the public network's own output f(p0, x).
        With few parameters, this pays: losses of linear models have proved rounding, take whole
        passes in matrix products, and `cu.exact` takes such features too.

        Args:
          inputs, scales: as for `apply`.
          microbatch_size: as for `scales`.

        Returns:
          `[batch, parameters]`, in the order of the flattened parameters, float32 or wider. Memory
          is a gradient for each example.

        Raises:
          ValueError: if the network has several outputs, whose tangent features are a matrix for
            each example; or as for `apply`.

        Guarantee:
          Each row's norm is at most the radius, as far as `scales` guarantees it for the numbers
          that reverse mode returns here: the product with s adds one rounding, and s leaves room
          for more. An example of scale 0 has features 0.
        """
        size = _batch_size(inputs)
        if jnp.shape(scales) != (size,):
            raise ValueError(f"scales must have shape ({size},), got {jnp.shape(scales)}")

        def output(params: ArrayTree, one: ArrayTree) -> jax.Array:
            outputs = self._outputs(params, jax.tree.map(lambda leaf: leaf[None], one), 1)
            if outputs.size != 1:
                raise ValueError(f"apply_fn must have one output each, got {outputs.size}")
            return outputs.reshape(())

        def row(example: tuple[ArrayTree, jax.Array]) -> jax.Array:
            one, scale = example
            slopes = jax.tree.leaves(jax.grad(output)(self.public_params, one))
            flat = jnp.concatenate([leaf.ravel() for leaf in slopes])
            return jnp.where(scale > 0, scale.astype(flat.dtype) * flat, 0)

        examples = jax.tree.map(jnp.asarray, inputs), jnp.asarray(scales, jnp.float32)
        return jax.lax.map(row, examples, batch_size=microbatch_size)

    def logistic_loss(self, l2: float, binary: bool = False) -> ConvexLoss:
        """Logistic regression on the tangent model, with its constants.

        Args:
          l2: coefficient of l2/2 ||w||^2, added to the mean over the batch.
          binary: the network has one output, `[batch]` or `[batch, 1]`, the log odds of a label
            above 0 (labels 0 and 1, or -1 and 1). Otherwise `[batch, classes]`, at least two.

        Returns:
          A `ConvexLoss` with `loss_fn(w, (inputs, scales, labels))`: scales as `scales` gives them,
          labels `[batch]`. A label that is no class (-1, say) has the loss log(sum exp(outputs)).
          The loss has no `feature_norm`, so `gradient_descent` refuses it: the network's own
          rounding has no known bound. Descend with Optax from `zeros()`, or use
          `solvers.minimize` with an `allowance` for that rounding.

        Raises:
          TypeError: if `l2` is not a number, or `binary` not a bool.
          ValueError: if `l2` is not positive; by `loss_fn`, for labels or outputs of other shapes.

        Guarantee:
          With C the radius, for every batch and w: m = l2, L = l2 + C^2/2 and G = sqrt(2) C; for
          one output, L = l2 + C^2/4 and G = C. Proof: an example's outputs are affine in w with
          matrix A = s J, so its loss has gradient A^T (p - e_y) and Hessian A^T H A, with p the
          softmax and H = diag(p) - p p^T. The operator norm of A is at most its Frobenius norm, so
          at most C. ||p - e_y||^2 = (1 - p_y)^2 + sum of p_k^2 over the others <= 2 (1 - p_y)^2,
          at most 2; with no class it is ||p||^2 <= 1. And v^T H v is the variance of v_k under p,
          so between 0 and (max v - min v)^2 / 4 <= 2 ||v||^2 / 4. One output has |p - y| <= 1 and
          p (1 - p) <= 1/4. Means keep these bounds, and the L2 term adds l2 to every eigenvalue.

        Source:
          Boehning (1992), Multinomial logistic regression algorithm (the bound on H); Golatkar et
          al. (2021), Mixed-privacy forgetting in deep networks (tangent models for unlearning).
        """
        l2 = checks.positive("l2", l2)
        binary = checks.flag("binary", binary)

        def loss_fn(w: ArrayTree, batch: Sequence) -> jax.Array:
            inputs, scales, labels = batch
            outputs = self.apply(w, inputs, scales)
            labels = jnp.asarray(labels)
            if labels.shape != outputs.shape[:1]:
                raise ValueError(f"labels must have shape {outputs.shape[:1]}, got {labels.shape}")
            if binary != (outputs.size == outputs.shape[0]):
                count = "one output" if binary else "two outputs or more"
                raise ValueError(f"binary={binary} needs {count} each, got shape {outputs.shape}")
            squares = [jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(w)]
            length = sum(square.astype(outputs.dtype) for square in squares)
            labels = labels.astype(outputs.dtype)
            if binary:
                entropy = losses.logistic(outputs.reshape(labels.shape), labels)
            else:
                entropy = losses.softmax(outputs, labels)
            return jnp.mean(entropy) + l2 / 2 * length

        # `scales` stays below the radius by more than these float64 roundings.
        curvature, slope = (0.25, 1.0) if binary else (0.5, math.sqrt(2))
        smoothness = l2 + curvature * self.radius**2
        return ConvexLoss(
            loss_fn=loss_fn,
            strong_convexity=l2,
            smoothness=smoothness,
            gradient_bound=slope * self.radius,
            l2=l2,
        )

    def _outputs(self, params: ArrayTree, inputs: ArrayTree, size: int) -> jax.Array:
        outputs = jnp.asarray(self.apply_fn(params, inputs))
        if outputs.ndim not in (1, 2) or outputs.shape[0] != size or outputs.size == 0:
            wanted = f"[{size}] or [{size}, classes]"
            raise ValueError(f"apply_fn must return outputs {wanted}, got shape {outputs.shape}")
        # Narrower numbers would round the scales up.
        return outputs if outputs.dtype == jnp.float64 else outputs.astype(jnp.float32)

    def _like_params(self, w: ArrayTree) -> ArrayTree:
        given, wanted = (
            [(jax.tree_util.keystr(path), jnp.shape(leaf)) for path, leaf in leaves]
            for leaves in map(jax.tree_util.tree_leaves_with_path, (w, self.public_params))
        )
        if given != wanted:
            raise ValueError(f"w must have the leaves of public_params, {wanted}, got {given}")
        return jax.tree.map(_at_least, self.public_params, w)


jax.tree_util.register_dataclass(Linearized, ["public_params"], ["apply_fn", "radius"])


def linearized(
    apply_fn: Callable[..., jax.Array], public_params: ArrayTree, radius: float
) -> Linearized:
    """Replaces a network by its tangent at public weights, a model whose convex losses are convex.

    Args:
      apply_fn: `apply_fn(params, inputs)`, outputs `[batch, classes]` or `[batch]`. It must treat
        each example separately (no batch statistics, no dropout) and be differentiable in forward
        mode, so without `jax.custom_vjp`. Close over the weights that are not to be trained.
      public_params: p0, a pytree of float32 or float64 arrays, independent of the private data.
      radius: bound on the norm of each example's tangent features, between 1e-30 and 1e30.

    Returns:
      A `Linearized`: outputs f(p0, x) + s(x) J(x) w, learned in w from `zeros()`.

    Raises:
      TypeError: if `apply_fn` is not callable, or `radius` not a number.
      ValueError: if `radius` is out of range, or `public_params` empty, narrow or not finite.

    >>> model = linearized(lambda p, x: jnp.tanh(x @ p), jnp.zeros((2, 3)), radius=1.0)
    >>> inputs = jnp.array([[3.0, 4.0], [0.1, 0.0]])
    >>> print(model.scales(inputs).round(3))  # Jacobians of norm 5 sqrt(3) and 0.1 sqrt(3)
    [0.115 1.   ]
    >>> loss = model.logistic_loss(l2=0.1)
    >>> loss.strong_convexity, loss.smoothness
    (0.1, 0.6)
    """
    if not callable(apply_fn):
        raise TypeError(
            f"apply_fn must be a function of params and inputs, got {checks.shown(apply_fn)}"
        )
    radius = checks.positive("radius", radius)
    norms.check_norm("radius", radius)
    if not jax.tree.leaves(public_params):
        raise ValueError(
            f"public_params must hold at least one array, got {checks.shown(public_params)}"
        )
    trees.check_wide(public_params)
    trees.check_finite("public_params", public_params)
    return Linearized(apply_fn, jax.tree.map(jnp.asarray, public_params), radius)


def _at_least(like: jax.Array, leaf: ArrayLike) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf if leaf.dtype == jnp.float64 else leaf.astype(like.dtype)


def _widened(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _batch_size(inputs: ArrayTree) -> int:
    sizes = sorted({jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(inputs)})
    if len(sizes) != 1 or sizes[0] in ((), (0,)):
        raise ValueError(
            f"inputs must be arrays with one leading axis of at least 1, got lengths {sizes}"
        )
    return sizes[0][0]
