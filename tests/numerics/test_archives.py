"""Archives of strangers: bounded memory, one kind of error, nothing run."""

import io
import os
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_helpers import run

from certunlearn._numerics import archives, files


def entry(array=None, header=None, data=b""):
    """An array as an archive holds it, or a header and what follows."""
    file = io.BytesIO()
    if header is None:
        np.lib.format.write_array(file, np.ones(3) if array is None else array, allow_pickle=True)
    else:
        text = header.encode("latin1") + b"\n"
        file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)
    return file.getvalue()


def archive(path, entries, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


def header(descr="<f8", shape="(3,)"):
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([("a.npy", entry()), ("a.npy", entry())], "two arrays of the same name"),
        ([("a", entry())], "which is no array"),
        ([("a.npy", entry(np.array([1, "x"], object)))], "objects"),
        ([("a.npy", b"")], "readable"),
        ([("a.npy", entry()[:-1])], "not of the size|ends within"),
        ([("a.npy", entry() + b"x")], "more than the array"),
        ([("a.npy", entry(header=header(shape="(10**9,)")))], "readable"),
        ([("a.npy", entry(header=header(shape="(1000000000000,)")))], "not of the size"),
        ([("a.npy", entry(header=header(shape=f"(1{'0' * 400},)")))], "not of the size"),
        ([("a.npy", entry(header=header(shape="(-1,)")))], "not of the size"),
        ([("a.npy", entry(header=header("<U0", "(1000000000000,)")))], "not numbers"),
        ([("a.npy", entry(header=header(shape="(0, 1000000000000000000000000)")))], "readable"),
        ([("a.npy", entry(header="(" * 5000))], "readable"),
        ([("a.npy", entry(header="\\x1b[2J"))], "readable"),
        ([("a.npy", entry(np.array(["text"])))], "no archive of parameters"),
        ([("a.npy", entry(np.zeros(2, "f8,i4")))], "no archive of parameters"),
        ([("a.npy", entry()), ("a.npy.npy", entry())], "does not tell apart"),
        ([], "at least one array"),
        ([(".npy", entry()), ("value.npy", entry())], "two leaves"),
    ],
)
def test_odd_archives_are_value_errors(tmp_path, entries, words):
    path = archive(tmp_path / "m.npz", entries)
    with pytest.raises(ValueError, match=words) as caught:
        files.load_params(path)
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


def test_what_numpy_writes_is_read(tmp_path):
    arrays = {"a.npy": np.ones(3), "b": np.arange(4, dtype=">i2").reshape(2, 2).T}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "m.npz", **arrays)
        loaded = files.load_params(tmp_path / "m.npz")
        for name, array in arrays.items():
            np.testing.assert_array_equal(loaded[name], array)


def test_sizes_are_looked_at_before_anything_is_unpacked(tmp_path, monkeypatch):
    archive(tmp_path / "bomb.npz", [("a.npy", entry(np.zeros(10**6)))], zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.npz").stat().st_size < 20_000
    assert files.load_params(tmp_path / "bomb.npz")["a"].size == 10**6
    monkeypatch.setattr(archives, "_array", None)  # nothing is unpacked
    with pytest.raises(ValueError, match="unpacks to 8000128 bytes, more than the 7000000"):
        files.load_params(tmp_path / "bomb.npz", max_bytes=7_000_000)
    monkeypatch.setattr(archives, "MOST_UNPACKED_BYTES", 10**6)
    with pytest.raises(ValueError, match="unpacks to 8000128 bytes, more than the 1000000"):
        files.load_params(tmp_path / "bomb.npz")
    files.save_params(tmp_path / "m.npz", {"a": np.zeros(10**6)})
    with pytest.raises(ValueError, match="more than the 10 that"):
        files.load_params(tmp_path / "m.npz", max_bytes=10)


def test_what_is_not_compressed_may_have_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MOST_UNPACKED_BYTES", 10)
    files.save_params(tmp_path / "m.npz", {"a": np.zeros(10**5)})
    assert files.load_params(tmp_path / "m.npz")["a"].size == 10**5


def test_an_entry_that_unpacks_to_more_than_it_declares_is_refused(tmp_path):
    path = archive(tmp_path / "m.npz", [("a.npy", entry(np.zeros(10**5)))], zipfile.ZIP_DEFLATED)
    declared = struct.pack("<I", 10**5 * 8 + 128)
    content = path.read_bytes()
    assert content.count(declared) == 2
    path.write_bytes(content.replace(declared, struct.pack("<I", 1000)))
    with pytest.raises(ValueError, match="readable"):
        files.load_params(path)


def test_methods_without_a_bound_on_what_comes_out_are_refused(tmp_path):
    path = archive(tmp_path / "m.npz", [("a.npy", entry())], zipfile.ZIP_BZIP2)
    with pytest.raises(ValueError, match="another method"):
        files.load_params(path)


def test_encrypted_entries_are_refused(tmp_path):
    path = archive(tmp_path / "m.npz", [("a.npy", entry())])
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag in the directory
    content[6] |= 1  # and before the entry
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="not a readable"):
        files.load_params(path)


@pytest.mark.slow
def test_the_peak_is_that_of_the_program_itself():
    held = bytearray(400_000_000)
    held[::4096] = b"1" * len(held[::4096])
    assert 1_000 < int(run("print(peak())")) < 100_000
    assert int(run("held = b'1' * 300_000_000\nprint(peak())")) > 290_000


@pytest.mark.slow
def test_a_bomb_takes_no_memory(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
        file.open("a.npy", "w", force_zip64=True) as member,
    ):
        member.write(entry(header=header(shape=f"({325 * 10**6},)")))
        for _ in range(325):
            member.write(bytes(8 * 10**6))
    script = (
        "import sys; from certunlearn._numerics import files\n"
        "before = peak()\n"
        "try: files.load_params(sys.argv[1])\n"
        "except ValueError: pass\n"
        "else: sys.exit(1)\n"
        "print(peak() - before)"
    )
    assert int(run(script, tmp_path / "bomb.npz")) < 50_000  # kilobytes


def mutated(content, changes):
    content = bytearray(content)
    for place, byte in changes:
        content[place % len(content)] = byte
    return bytes(content)


GOOD = io.BytesIO()
archives.write(GOOD, {"a": np.arange(3.0), "b/c": np.ones((2, 2), np.float32)})


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_bytes_are_read_or_value_errors(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / f"fuzz{os.getpid()}.npz"
    path.write_bytes(mutated(GOOD.getvalue(), changes))
    try:
        loaded = files.load_params(path)
    except ValueError:
        return
    assert files.params_digest(loaded)
