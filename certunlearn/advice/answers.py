"""What `advise` answers: options from best to worst, each with its reasons."""

import dataclasses

from certunlearn.advice import wording
from certunlearn.advice.measurements import RelativeCost
from certunlearn.mechanisms import Mechanism


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survival:
    """What of the old model an option can keep; theorems, not measurements.

    Attributes:
      tv_limit: no event is more likely than under the reference by more than this.
      tv_limit_to_center: likewise beside the same noisy run started from the centre, which is
        nearer than any other start; None if the method starts from no ball.
      kept_radius: the largest norm of what the start may keep, in parameter units; None if no scale
        of fresh weights is known, which sets the size of the noise.
      share_of_distance: kept_radius over the distance of the trained model from the centre, at most
        1; None if either is not known. Private, as the distance is.
    """

    tv_limit: float
    tv_limit_to_center: float | None
    kept_radius: float | None = None
    share_of_distance: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNoise:
    """What the noise does to one layer.

    Attributes:
      name: the leaf's path.
      size: how many numbers it has.
      fresh_scale: standard deviation of fresh weights there; None if not known, as for biases.
      noise_over_fresh: the total noise over that; 1 is as large as the weights of a fresh start.
    """

    name: str
    size: int
    fresh_scale: float | None
    noise_over_fresh: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseEffect:
    """The noise of an option.

    Attributes:
      total: standard deviation of all noise in each last parameter, in parameter units; None if no
        scale is known.
      norm: root mean square norm of that noise over all parameters.
      norm_over_kept: the same over the norm of what the start may keep. It does not depend on the
        radius: noise and radius grow together.
      layers: the total noise beside each layer's fresh weights, if parameters were given.
    """

    total: float | None = None
    norm: float | None = None
    norm_over_kept: float | None = None
    layers: tuple[LayerNoise, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One way to serve the request.

    Attributes:
      title: what it is, in words.
      method: the library's name for it.
      call: how to call it.
      guarantee: what it promises, in words.
      epsilon: of the guarantee.
      delta: of the guarantee.
      cost: what was measured beside the cheapest retraining; None if nothing was.
      cost_words: what it costs, in words.
      seconds: at most how many seconds a request takes, by the time of an epoch that you gave; None
        if nothing follows from it.
      survival: what of the old model can survive; None if nothing of it is used.
      noise: what the noise does; None if there is none.
      reasons: why it stands where it stands.
      assumes: what a certificate rests on.
      mechanism: ready to run, if all of its numbers are known.
      noise_scale: of each step of `mechanism`; None without it, or without noise.
    """

    title: str
    method: str
    call: str
    guarantee: str
    epsilon: float
    delta: float
    cost: RelativeCost | None = None
    cost_words: str
    seconds: float | None = None
    survival: Survival | None = None
    noise: NoiseEffect | None = None
    reasons: tuple[str, ...] = ()
    assumes: tuple[str, ...] = ()
    mechanism: Mechanism | None = None
    noise_scale: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """The answer: print it, or read its fields. Notebooks show it as tables.

    Attributes:
      verdict: the answer in a sentence.
      why: the reasons for it.
      options: from best to worst. Those that promise nothing in your case stand last.
      ruled_out: methods that are no option, each with the reason.
      questions: what you left out and would change the answer.
      notes: what holds for all of it.
    """

    verdict: str
    why: tuple[str, ...]
    options: tuple[Option, ...]
    ruled_out: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """The advice for people, as `certunlearn advise` prints it."""
        return wording.to_text(self)

    def _repr_html_(self) -> str:
        """The advice as notebooks show it."""
        return wording.to_html(self)
