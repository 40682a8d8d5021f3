"""What exact mechanisms have in common: no noisy step, no noise, no distance to hide."""

from typing import Self

import optax
from chex import ArrayTree

from certunlearn.mechanisms import base


class WithoutNoise(base.Mechanism):
    """What is released is a function of retain data, public things and independent randomness."""

    exact = True
    steps = 0

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What a certificate for this mechanism rests on, in sentences."""
        raise NotImplementedError

    def rests_on(self) -> tuple[str, ...]:
        """`assumptions`, which are complete."""
        return self.assumptions

    def separations(self) -> None:
        """None: there is no noise, and no distance that it would hide."""

    def update(self, center: ArrayTree | None) -> optax.GradientTransformation:
        """No step."""
        del center
        return optax.set_to_zero()

    def first(self, steps: int) -> Self:
        """The mechanism itself, of no noisy steps.

        Raises:
          ValueError: if `steps` is not 0.
        """
        if isinstance(steps, bool) or steps != 0:
            raise ValueError(
                f"{type(self).__name__} has no noisy steps: steps must be 0, got {steps!r:.80}"
            )
        return self

    def can_stop(self, steps: int) -> bool:
        """Yes: there is nothing that noise would have to hide."""
        del steps
        return True
