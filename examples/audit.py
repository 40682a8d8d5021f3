"""Audit: what an auditor works out from a certificate, without trusting whoever issued it.

Shows: the JSON is read as plain data. Epsilon, what an attack reaches, and the model's SHA-256 are
worked out from it anew; a tampered copy is found out.
Keeps the guarantee: nothing is taken from the record but what the issuer says was run.
Would void it: trusting that it was run. No file shows that; ask the issuer what is printed last.
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

import certunlearn as cu

folder = Path(__file__).parents[1] / "benchmarks" / "demo-digits"
record_path, params_path = folder / "certificate.json", folder / "unlearned.npz"
if __name__ == "__main__" and len(sys.argv) == 3 and sys.argv[1].endswith(".json"):
    record_path, params_path = map(Path, sys.argv[1:])


def digest_of(params):
    """SHA-256 of the parameters, written out: the format's definition, not the issuer's code."""
    digest = hashlib.sha256()
    for name, leaf in sorted(params.items()):
        digest.update(f"{len(name.encode())}:{name}:{leaf.dtype.name}:{leaf.shape};".encode())
        digest.update(leaf.astype(leaf.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def record_digest_of(fields):
    """SHA-256 of the record, written out: these fields do not count where they are null."""
    counted = {name: value for name, value in fields.items() if name != "record_digest"}
    for name in {"epsilon_lower_bound", "evidence", "separations", "sums_digest"} & set(counted):
        if counted[name] is None:
            del counted[name]
    text = json.dumps(counted, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


record = json.loads(record_path.read_text())
assert record_digest_of(record) == record["record_digest"]
fields = {name: value for name, value in record["mechanism"].items() if name != "name"}
assert record["mechanism"]["name"] == "GradientClipping", "this script knows one mechanism"
mechanism = cu.GradientClipping(**fields).first(record["steps_run"])
run = {"noise_scale": record["noise_scale"], "delta": record["delta"]}

# 1. Does the claim follow from the numbers? By the issuer's accountant, and by a simpler one.
epsilon = cu.epsilon(mechanism, **run, accountant=record["accountant"])
simple = cu.epsilon(mechanism, **run, accountant="interpolation")
reached = cu.epsilon_lower_bound(mechanism, **run)
print(f"epsilon: recorded {record['epsilon']:.4f}, recomputed {epsilon:.4f}")
print(f"an attack reaches {reached:.4f}; a simpler accountant gives {simple:.4f}")
assert abs(epsilon - record["epsilon"]) < 1e-3 * epsilon
assert reached <= epsilon <= simple * (1 + 1e-9)

# 2. Is this the model? Only the parameters that the digest is of are covered.
with np.load(params_path, allow_pickle=False) as archive:
    params = {name: archive[name] for name in archive.files}
assert digest_of(params) == record["params_digest"]
assert sum(leaf.size for leaf in params.values()) == record["coverage"]["parameters"]
print(f"the model is the recorded one: {record['params_digest'][:16]}...")

# 3. The library's own check, which looks at every field; and a copy that promises more.
certificate = cu.Certificate.load(record_path)
verified = cu.verify(certificate, params)
assert verified, verified.problems
with tempfile.TemporaryDirectory() as place:
    forged = Path(place, "certificate.json")
    promise = record | {"epsilon": record["epsilon"] / 2, "epsilon_lower_bound": 0.0}
    promise["record_digest"] = record_digest_of(promise)  # anyone can make it anew
    forged.write_text(json.dumps(promise))
    found = cu.verify(cu.Certificate.load(forged))
    assert found.problems[0].startswith("epsilon is recorded as"), found.problems

# 4. What no file shows: ask the issuer.
print("Ask the issuer whether these hold:", *record["assumptions"], sep="\n  - ")
