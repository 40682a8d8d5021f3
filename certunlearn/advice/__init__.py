"""Advice: what to do with a model and a request to delete, before anything is run.

`advise` goes from what a user knows to options from best to worst. `suggest_clipping` proposes the
hyperparameters of `GradientClipping`.
"""

from certunlearn.advice.advising import advise
from certunlearn.advice.answers import Advice, LayerNoise, NoiseEffect, Option, Survival
from certunlearn.advice.clipping_search import Suggestion, Tried, suggest_clipping
from certunlearn.advice.measurements import RelativeCost

__all__ = [
    "Advice",
    "LayerNoise",
    "NoiseEffect",
    "Option",
    "RelativeCost",
    "Suggestion",
    "Survival",
    "Tried",
    "advise",
    "suggest_clipping",
]
