import errno
import io
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from certunlearn._numerics import files

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


def test_digests_of_wide_dtypes_do_not_change():
    tree = {
        "f64": np.arange(6.0).reshape(2, 3),
        "f32": np.array([0.1, -0.0, 1e-40], np.float32),
        "i32": np.arange(4, dtype=np.int32).reshape(2, 2),
        "u8": np.array([1, 255], np.uint8),
        "b": np.array([True, False]),
        "c64": np.array([1 + 2j], np.complex64),
        "nested": {"i64": np.int64(7), "empty": np.zeros((0, 3), np.float32)},
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "big": np.arange(3.0).astype(">f8"),
        "float": 0.5,
        "ü": np.ones(1),
    }
    known = "2136bcad4a2c482640206e07a8a3bc95e04d121a19e3c044c03117031b510ce6"
    assert files.params_digest(tree) == known


def test_complex_numbers_are_saved(tmp_path):
    tree = {"a": np.array([1 + 2j], ">c16"), "b": jnp.array([1j])}
    files.save_params(tmp_path / "m.npz", tree)
    assert files.params_digest(files.load_params(tmp_path / "m.npz")) == files.params_digest(tree)


def test_none_is_no_leaf_and_no_leaves_are_no_parameters(tmp_path):
    assert set(files.named_leaves({"a": jnp.ones(1), "bias": None})) == {"a"}
    for nothing in (None, {}, {"a": None}):
        for function in (files.params_digest, lambda t: files.save_params(tmp_path / "m.npz", t)):
            with pytest.raises(ValueError, match="at least one array"):
                function(nothing)
    assert os.listdir(tmp_path) == []


def test_names_that_numpy_mixes_up_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'a' and 'a\.npy', which numpy.load"):
        files.save_params(tmp_path / "m.npz", {"a": np.ones(1), "a.npy": np.zeros(1)})


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu"])
def test_every_narrow_float_digests_as_what_jax_casts_it_to(name):
    dtype = jnp.dtype(name)
    bits = np.arange(2 ** (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    narrow = bits.view(dtype)
    narrow = narrow[np.isfinite(narrow.astype(np.float32))]
    cast = {"a": jnp.asarray(narrow).astype(jnp.float32)}
    assert files.params_digest({"a": narrow}) == files.params_digest(cast)
    back = np.asarray(cast["a"]).astype(dtype)
    np.testing.assert_array_equal(back.view(bits.dtype), narrow.view(bits.dtype))


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


HIDDEN = ".run.private.npz.tmp-abcd1234.private.npz"


def test_hidden_files_of_private_ones_are_private(tmp_path):
    def look(file):
        (name,) = os.listdir(tmp_path)
        assert name.endswith(".private.npz")
        assert name.startswith(".run")
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
        file.write(b"secret")

    files.write_atomically(tmp_path / "run.private.npz", look, private=True)
    assert os.listdir(tmp_path) == ["run.private.npz"]


def test_hidden_files_of_killed_processes_are_removed(tmp_path):
    others = {".run.private.npz.tmp-abcd1234.private.json", ".run.private.npz", ".else.private.npz"}
    for name in (HIDDEN, *others):
        (tmp_path / name).write_bytes(b"left behind")
    files.write_atomically(tmp_path / "run.private.npz", lambda f: f.write(b"x"), private=True)
    assert set(os.listdir(tmp_path)) == {"run.private.npz", *others}


def test_a_process_killed_while_writing_leaves_nothing_for_long(tmp_path):
    script = (
        "import os, signal, sys; from certunlearn._numerics import files\n"
        "files.write_atomically(sys.argv[1], lambda f: os.kill(os.getpid(), signal.SIGKILL),"
        " private=True)"
    )
    path = tmp_path / "run.private.npz"
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.endswith(".private.npz")
    files.write_atomically(path, lambda file: file.write(b"x"), private=True)
    assert os.listdir(tmp_path) == ["run.private.npz"]


@pytest.mark.slow
def test_what_a_living_process_writes_is_not_removed(tmp_path):
    path = tmp_path / "run.private.npz"
    script = (
        "import sys; from certunlearn._numerics import files\n"
        "def write(file):\n"
        "    print('writing', flush=True); sys.stdin.readline(); file.write(b'slow')\n"
        "files.write_atomically(sys.argv[1], write, private=True)"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"writing\n"
        files.write_atomically(path, lambda file: file.write(b"quick"), private=True)
        assert path.read_bytes() == b"quick"
        process.communicate(b"\n")
    assert process.returncode == 0
    assert path.read_bytes() == b"slow"
    assert os.listdir(tmp_path) == ["run.private.npz"]


def test_two_writers_of_one_path_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "file"

    def outer(file):
        files.write_atomically(path, lambda inner: inner.write(b"inner"))
        file.write(b"outer")

    files.write_atomically(path, outer)
    assert path.read_bytes() == b"outer"
    assert os.listdir(tmp_path) == ["file"]


def test_symbolic_links_are_followed_but_not_for_private_files(tmp_path):
    (tmp_path / "folder").mkdir()
    real, link = tmp_path / "folder" / "real", tmp_path / "link"
    link.symlink_to(real)
    for content in (b"first", b"second"):  # also where nothing is there yet
        files.write_atomically(link, lambda file, content=content: file.write(content))
        assert real.read_bytes() == content
    assert link.is_symlink()
    with pytest.raises(PermissionError, match=r"symbolic link.*link"):
        files.write_atomically(link, lambda file: file.write(b"secret"), private=True)
    assert real.read_bytes() == b"second"
    (tmp_path / "round").symlink_to(tmp_path / "round")
    with pytest.raises(OSError, match="round"):
        files.write_atomically(tmp_path / "round", lambda file: file.write(b"x"))


def full(file):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("name", "kind", "write"),
    [
        ("", IsADirectoryError, None),
        ("absent/file", FileNotFoundError, None),
        ("present/file", OSError, None),  # a file is no folder
        ("x" * 300, OSError, None),
        ("full", OSError, full),
    ],
)
@pytest.mark.parametrize("private", [False, True])
def test_paths_that_cannot_be_written_are_named(tmp_path, name, kind, write, private):
    (tmp_path / "present").write_bytes(b"x")
    path = tmp_path / name
    with pytest.raises(kind) as caught:
        files.write_atomically(path, write or (lambda file: file.write(b"x")), private=private)
    assert str(path) in str(caught.value)
    assert ".tmp" not in str(caught.value)
    assert os.listdir(tmp_path) == ["present"]


def test_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"device or pipe.*pipe'"):
        files.write_atomically(tmp_path / "pipe", lambda file: file.write(b"x"))
    assert (tmp_path / "pipe").is_fifo()


def test_long_endings_of_private_files_fit(tmp_path):
    name = "m." + "x" * 240 + ".npz"
    files.write_atomically(tmp_path / name, lambda file: file.write(b"x"), private=True)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["n" * 250 + ".npz", "ü" * 125 + ".npz"])
def test_the_longest_names_can_be_written(tmp_path, name):
    files.save_params(tmp_path / name, PARAMS)
    assert files.params_digest(files.load_params(tmp_path / name)) == files.params_digest(PARAMS)


def test_what_is_no_path_is_refused():
    for wrong in (3, None, b"bytes.npz", io.BytesIO()):
        with pytest.raises(TypeError, match="path must be a string"):
            files.save_params(wrong, PARAMS)
        with pytest.raises(TypeError, match="path must be a string"):
            files.load_params(wrong)
    with pytest.raises(TypeError, match="max_bytes must be a whole number"):
        files.load_params("m.npz", max_bytes="all")
    with pytest.raises(ValueError, match="null character"):
        files.save_params("a\0b.npz", PARAMS)


def test_an_error_of_the_writer_itself_is_not_changed(tmp_path):
    mine = FileNotFoundError(errno.ENOENT, "no font", "/fonts/serif")

    def write(file):
        raise mine

    with pytest.raises(FileNotFoundError) as caught:
        files.write_atomically(tmp_path / "file", write)
    assert caught.value is mine
    assert os.listdir(tmp_path) == []


def test_bad_files_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        files.save_params(tmp_path / "model.bin", PARAMS)
    files.save_params(tmp_path / "m.npz", PARAMS)
    truncated = tmp_path / "truncated.npz"
    truncated.write_bytes((tmp_path / "m.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match="not a readable"):
        files.load_params(truncated)
    with pytest.raises(FileNotFoundError):
        files.load_params(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int4, jnp.uint4]
)
def test_narrow_numbers_are_saved_exactly(tmp_path, dtype):
    narrow = {"a": jnp.array([0.0, 1.0, 2.0, 3.0, 6.0]).astype(dtype), "b": jnp.ones(2)}
    wide = jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).dtype.name
    files.save_params(tmp_path / "m.npz", narrow)
    loaded = files.load_params(tmp_path / "m.npz")
    np.testing.assert_array_equal(loaded["a"], [0, 1, 2, 3, 6])
    assert files.params_digest(loaded) == files.params_digest(narrow)
    if wide == jnp.float32:
        cast = {"a": narrow["a"].astype(wide), "b": narrow["b"]}
        assert files.params_digest(cast) == files.params_digest(narrow)
        assert loaded["a"].dtype == np.float32


def test_a_digest_of_narrow_floats_sees_every_bit():
    ones = jnp.ones(3, jnp.bfloat16)
    above = jax.lax.bitcast_convert_type(
        jax.lax.bitcast_convert_type(ones, jnp.uint16) + jnp.uint16(1), jnp.bfloat16
    )
    assert files.params_digest({"a": ones}) != files.params_digest({"a": above})


@pytest.mark.parametrize(
    "leaf",
    [
        "text",
        np.array(["a", "b"]),
        np.array([1, None], object),
        np.ma.masked_array([1.0, 2.0], [True, False]),
        np.array(["2026-01-01"], "datetime64[D]"),
        np.ones(2, np.longdouble),
        jax.random.key(0),
        10**400,
        object(),
        b"bytes",
    ],
)
def test_leaves_that_are_no_numbers_are_named(tmp_path, leaf):
    for function in (files.params_digest, lambda tree: files.save_params(tmp_path / "m.npz", tree)):
        with pytest.raises(TypeError, match=r"params\['a'\] must be an array of numbers"):
            function({"a": leaf})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a\0b", "a\udc80", "a" * 70_000])
def test_names_that_no_file_can_hold_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="no file can hold"):
        files.save_params(tmp_path / "m.npz", {name: np.ones(1)})


def test_a_deleted_array_is_named():
    gone = jnp.ones(2)
    gone.delete()
    with pytest.raises(TypeError, match=r"params\['a'\]"):
        files.params_digest({"a": gone})


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0)])
def test_odd_shapes_survive(tmp_path, shape):
    tree = {"a": np.ones(shape, np.float32), "f": np.asfortranarray(np.arange(6.0).reshape(2, 3))}
    files.save_params(tmp_path / "m.npz", tree)
    loaded = files.load_params(tmp_path / "m.npz")
    assert files.params_digest(loaded) == files.params_digest(tree)
    assert loaded["a"].shape == shape
    loaded["f"][0, 0] = 7.0  # and may be written to
