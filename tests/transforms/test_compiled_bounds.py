"""Every strict bound holds however it is compiled: the checks of `bound_helpers` in every mode."""

import os
import pathlib
import subprocess
import sys

import bound_helpers as bounds
import jax
import numpy as np
import pytest

MODES = list(bounds.MODES)
CENTERS = pytest.mark.parametrize("center", [None, bounds.CENTER], ids=["origin", "center"])


@pytest.mark.parametrize("mode", MODES)
def test_clip_is_strict_and_tight_at_all_magnitudes(mode):
    bounds.check_clip(mode)


@pytest.mark.parametrize("mode", ["jit", "jit of vmap", "scan"])
def test_clip_is_strict_in_float64(mode):
    with jax.enable_x64(True):
        bounds.check_clip(mode, np.float64)
        bounds.check_norm_bound(mode, np.float64)


@pytest.mark.parametrize("mode", ["jit", "vmap", "scan"])
def test_norm_bound_is_above_at_all_magnitudes(mode):
    bounds.check_norm_bound(mode)


@pytest.mark.parametrize("mode", ["jit", "vmap"])
def test_a_learning_rate_times_the_clip_is_strict(mode):
    bounds.check_rate(mode)


@CENTERS
@pytest.mark.parametrize("mode", ["jit", "vmap", "scan"])
def test_updated_parameters_are_in_the_ball(mode, center):
    bounds.check_project_onto_ball(mode, center)


@CENTERS
@pytest.mark.parametrize("mode", ["jit", "vmap", "scan"])
def test_projected_parameters_are_in_the_ball(mode, center):
    bounds.check_clip_params(mode, None if center is None else [center])


@pytest.mark.parametrize("mode", ["jit", pytest.param("jit of vmap", marks=pytest.mark.slow)])
def test_what_rests_on_the_clip_is_strict(mode):
    bounds.check_users(mode)


FAST = "--xla_cpu_enable_fast_math=true"
FASTER = " ".join(
    [FAST]
    + [f"--xla_cpu_fast_math_honor_{what}=false" for what in ("nans", "infs", "division")]
    + ["--xla_cpu_enable_fast_min_max=true"]
)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [FAST, FASTER], ids=["fast", "faster"])
def test_bounds_hold_under_fast_math(flags):
    script = pathlib.Path(bounds.__file__)
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    env["PYTHONPATH"] = str(script.parent.parent)
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
