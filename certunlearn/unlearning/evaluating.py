"""What `Options.evaluate` sees of a run, and what it answers."""

from typing import Any

from chex import ArrayTree

from certunlearn.unlearning import compiled_steps
from certunlearn.unlearning.prepared_run import Prepared


class Evaluations:
    """The answers of `Options.evaluate` during one phase. Private.

    Attributes:
      found: (step, answer), one for each call.
    """

    def __init__(self, prepared: Prepared) -> None:
        """None so far."""
        self.found: list[tuple[int, Any]] = []
        self._split, self._form, self._options = prepared.split, prepared.form, prepared.options

    def look(self, step: int, trainable: ArrayTree, last: bool) -> bool:
        """Asks, if it is time: at the last step of a phase, and at multiples of the interval.

        Returns:
          Whether it was asked.
        """
        more = self._options
        if more.evaluate is None or not (last or step % more.evaluate_every == 0):
            return False
        # A copy, for the next step overwrites the original in place.
        params = self._form.view(self._split.merge(compiled_steps.owned(trainable)))
        self.found.append((step, more.evaluate(params)))
        return True
