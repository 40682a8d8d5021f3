"""What `import certunlearn` loads: JAX, Optax, and nothing that only some calls need."""

import json
import subprocess
import sys

# Each takes between 0.03 and 1 second to load. SciPy's parts load when they are first used.
HEAVY = {
    *(f"scipy.{part}" for part in ("integrate", "interpolate", "linalg", "optimize")),
    *(f"scipy.{part}" for part in ("sparse", "spatial", "special", "stats")),
    *("flax", "equinox", "haiku", "orbax", "grain", "datasets", "tensorflow", "torch"),
    *("sklearn", "matplotlib", "pandas", "tqdm", "cryptography", "dp_accounting"),
    *("certunlearn.demo", "certunlearn.cli"),
}


def test_importing_loads_nothing_that_only_some_calls_need():
    # In a process of its own: this one has loaded them all.
    asked = f"import json, sys, certunlearn; print(json.dumps(sorted({HEAVY} & set(sys.modules))))"
    found = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == []
