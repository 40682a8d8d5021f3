"""The loop: prepare, run the noisy steps, fine-tune, release; and what an operator keeps."""

from certunlearn._numerics.keys import Keys, system_keys
from certunlearn.unlearning.history import PrivateHistory, UnlearningState, load_state, save_state
from certunlearn.unlearning.interrupts import UnlearningFailed, UnlearningInterrupted
from certunlearn.unlearning.loop import UnlearningResult, unlearn
from certunlearn.unlearning.model_state import recompute_statistics
from certunlearn.unlearning.options import Finetune, Options

__all__ = [
    "Finetune",
    "Keys",
    "Options",
    "PrivateHistory",
    "UnlearningFailed",
    "UnlearningInterrupted",
    "UnlearningResult",
    "UnlearningState",
    "load_state",
    "recompute_statistics",
    "save_state",
    "system_keys",
    "unlearn",
]
