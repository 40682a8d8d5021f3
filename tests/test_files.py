import os

import jax.numpy as jnp
import numpy as np
import pytest

from certunlearn import files

PARAMS = {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3)}}


def test_round_trip_keeps_the_digest(tmp_path):
    path = tmp_path / "model.npz"
    files.save_params(path, PARAMS)
    loaded = files.load_params(path)
    assert set(loaded) == {"dense/kernel", "dense/bias"}
    np.testing.assert_array_equal(loaded["dense/kernel"], PARAMS["dense"]["kernel"])
    assert files.params_digest(loaded) == files.params_digest(PARAMS)


def test_any_name_can_be_saved(tmp_path):
    awkward = {
        "file": np.ones(1),
        "allow_pickle": np.zeros(2),
        "a.npy": np.ones(3),
        "ü": np.ones(1),
    }
    files.save_params(tmp_path / "m.npz", awkward)
    assert files.params_digest(files.load_params(tmp_path / "m.npz")) == files.params_digest(
        awkward
    )


@pytest.mark.parametrize(
    "other",
    [
        {"dense": {"kernel": jnp.arange(6.0).reshape(3, 2), "bias": jnp.zeros(3)}},
        {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3) + 1e-7}},
        {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.zeros(3, jnp.int32)}},
        {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "offset": jnp.zeros(3)}},
        {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3)}},
    ],
)
def test_digest_sees_values_shapes_dtypes_and_names(other):
    assert files.params_digest(other) != files.params_digest(PARAMS)


def test_digest_is_independent_of_byte_order_and_insertion_order():
    native = {"a": np.arange(3.0), "b": np.ones(2)}
    swapped = {"b": np.ones(2), "a": np.arange(3.0).astype(">f8")}
    assert files.params_digest(native) == files.params_digest(swapped)


def test_colliding_paths_are_refused():
    with pytest.raises(ValueError, match="two leaves named 'a/b'"):
        files.named_leaves({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})


def test_a_failing_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def broken(file):
        file.write(b"half")
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        files.write_atomically(path, broken)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_permissions(tmp_path):
    files.write_atomically(tmp_path / "public", lambda file: file.write(b"x"))
    files.write_atomically(tmp_path / "secret", lambda file: file.write(b"x"), private=True)
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "public").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_bad_files_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        files.save_params(tmp_path / "model.bin", PARAMS)
    with pytest.raises(ValueError, match="cast it to float32"):
        files.save_params(tmp_path / "m.npz", {"a": jnp.ones(2, jnp.bfloat16)})
    files.save_params(tmp_path / "m.npz", PARAMS)
    truncated = tmp_path / "truncated.npz"
    truncated.write_bytes((tmp_path / "m.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable"):
        files.load_params(truncated)
    with pytest.raises(FileNotFoundError):
        files.load_params(tmp_path / "absent.npz")
