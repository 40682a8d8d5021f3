"""The loop, and what an operator keeps.

`unlearn` is four parts that can be called one by one: `prepare`, `run_noisy_steps`,
`run_finetuning` and `release`.
"""

from certunlearn._numerics.random_keys import Keys, system_keys
from certunlearn.unlearning.data_streams import Stream
from certunlearn.unlearning.finetuning import Finetuned, run_finetuning
from certunlearn.unlearning.interrupts import UnlearningFailed, UnlearningInterrupted
from certunlearn.unlearning.kept_steps import clear_compiled_steps
from certunlearn.unlearning.loop import unlearn
from certunlearn.unlearning.other_state import recompute_statistics
from certunlearn.unlearning.prepared_run import Prepared
from certunlearn.unlearning.preparing import prepare
from certunlearn.unlearning.private_history import (
    PrivateHistory,
    UnlearningState,
    load_state,
    save_state,
)
from certunlearn.unlearning.releasing import UnlearningResult, release
from certunlearn.unlearning.replicas import run_replicas
from certunlearn.unlearning.run_options import Finetune, Options
from certunlearn.unlearning.running import Noisy, run_noisy_steps

__all__ = [
    "Finetune",
    "Finetuned",
    "Keys",
    "Noisy",
    "Options",
    "Prepared",
    "PrivateHistory",
    "Stream",
    "UnlearningFailed",
    "UnlearningInterrupted",
    "UnlearningResult",
    "UnlearningState",
    "clear_compiled_steps",
    "load_state",
    "prepare",
    "recompute_statistics",
    "release",
    "run_finetuning",
    "run_noisy_steps",
    "run_replicas",
    "save_state",
    "system_keys",
    "unlearn",
]
