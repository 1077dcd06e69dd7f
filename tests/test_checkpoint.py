"""Checkpoints: what comes back, damage, and the environment that a bit-exact resume depends on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import bmsn.checkpoint
from bmsn.checkpoint import (
    CheckpointStore,
    environment,
    environment_differences,
)
from bmsn.errors import InputError
from checkpoints import assert_is_state_of, loaded_step, make_state, names


def test_every_kind_of_value_comes_back_with_its_bits(tmp_path):
    generator = np.random.default_rng(0)
    arena = torch.randn(4, 1000)
    state = {
        "tensor": torch.randn(3, 5).bfloat16(),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "row": arena[1],
        "array": generator.standard_normal((3, 4)),
        "fortran": np.asfortranarray(generator.standard_normal((3, 4))),
        "zero_dims": np.array(2.5),
        "uint8": np.arange(5, dtype=np.uint8),
        "scalar": np.float32(0.1),
        "count": np.int64(2**40),
        "float": 0.1 + 0.2,
        "int": 2**70,
        "flags": [True, None, "text", (1, 2.0)],
        "by_number": {7: torch.tensor(float("nan"))},
    }
    CheckpointStore(tmp_path).save(3, state)
    step, loaded = CheckpointStore(tmp_path).load_latest()

    assert step == 3
    assert list(loaded) == list(state)
    for name in ("tensor", "channels_last", "parameter", "row"):
        assert torch.equal(loaded[name], state[name])
        assert loaded[name].dtype == state[name].dtype
    assert loaded["channels_last"].is_contiguous(memory_format=torch.channels_last)
    for name in ("array", "fortran", "zero_dims", "uint8"):
        assert loaded[name].numpy().dtype == state[name].dtype
        assert np.array_equal(loaded[name].numpy(), state[name])
        assert loaded[name].shape == state[name].shape
    assert loaded["scalar"] == float(np.float32(0.1))
    assert type(loaded["count"]) is int
    assert (loaded["count"], loaded["float"], loaded["int"]) == (2**40, 0.1 + 0.2, 2**70)
    assert loaded["flags"] == [True, None, "text", (1, 2.0)]
    assert loaded["by_number"][7].isnan()


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path):
    path = CheckpointStore(tmp_path).save(0, {"row": torch.zeros(1000, 1000)[3]})
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [object()]}, r"state\['a'\]\[0\]"),
        ({"a": {(1, 2): 0}}, r"state\['a'\]"),
        ({"a": np.array(["text"])}, r"state\['a'\]"),
        ({"a": signal.SIGTERM}, r"state\['a'\]"),  # an IntEnum: torch.save takes it, a safe torch.load does not
    ],
    ids=["object", "key", "array of text", "enum"],
)
def test_a_value_that_could_not_be_loaded_again_is_refused_when_saving(value, place, tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(TypeError, match=place):
        store.save(1, value)
    assert names(tmp_path) == []


def test_the_last_two_are_kept_and_the_manifest_describes_them(tmp_path):
    store = CheckpointStore(tmp_path)
    assert store.load_latest() is None
    paths = [store.save(step, make_state(step)) for step in (0, 10, 20)]
    assert paths[-1].name == "checkpoint-000000020.pt"
    assert names(tmp_path) == ["checkpoint-000000010.pt", "checkpoint-000000020.pt", "manifest.json"]
    entries = json.loads((tmp_path / "manifest.json").read_text())["checkpoints"]
    for entry, path in zip(entries, paths[1:], strict=True):
        content = path.read_bytes()
        assert entry == {
            "file": path.name,
            "step": int(path.name[11:20]),
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    assert loaded_step(tmp_path) == 20


def test_keep_below_one_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least 1, not 0"):
        CheckpointStore(tmp_path, keep=0)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit_of_a_tensor(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(make_state(20)["weights"].numpy().tobytes()) + 5] ^= 1  # torch.load would not notice
    path.write_bytes(content)


def overwrite_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {
    "truncated": (truncate, "bytes instead of"),
    "bit flipped": (flip_a_bit_of_a_tensor, "sha256"),
    "emptied": (lambda path: os.truncate(path, 0), "0 bytes instead of"),
    "zeros": (overwrite_with_zeros, "sha256"),
    "missing": (os.unlink, "missing"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(damage, reason, tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    for step in (10, 20):
        path = store.save(step, make_state(step))
    damage(path)
    resumed = CheckpointStore(tmp_path)
    with caplog.at_level(logging.WARNING):
        step, state = resumed.load_latest()
    assert step == 10
    assert_is_state_of(10, state)
    (message,) = caplog.messages
    assert str(path) in message
    assert reason in message

    resumed.save(25, make_state(25))  # the run goes on: the damaged one must not push out the good one
    assert names(tmp_path) == ["checkpoint-000000010.pt", "checkpoint-000000025.pt", "manifest.json"]
    assert loaded_step(tmp_path) == 25


def test_a_file_with_the_right_sha256_that_runs_code_when_loaded_is_not_loaded(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    for step in (10, 20):
        path = store.save(step, make_state(step))
    torch.save({"step": 20, "state": {"weights": subprocess.Popen}}, path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    content = path.read_bytes()
    manifest["checkpoints"][1] |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert loaded_step(tmp_path) == 10
    assert "Popen" in caplog.text


def test_all_damaged_is_an_error_that_lists_them(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (10, 20):
        os.truncate(store.save(step, make_state(step)), 7)
    with pytest.raises(InputError, match=r"000000020\.pt: 7 bytes.*000000010\.pt: 7 bytes"):
        CheckpointStore(tmp_path).load_latest()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"checkpoints": [{"file": "../x", "step": 1, "size": 1, "sha256": ""}]}', '{"checkpoints": [{}]}'],
    ids=["empty", "torn", "list", "path outside", "no fields"],
)
def test_a_damaged_manifest_is_an_error(content, tmp_path):
    CheckpointStore(tmp_path).save(10, make_state(10))
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json: damaged"):
        CheckpointStore(tmp_path)


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="no folder for checkpoints"):
        CheckpointStore(tmp_path / "file")


def test_environment_is_plain_and_names_what_bit_exactness_depends_on():
    now = environment()
    assert json.loads(json.dumps(now)) == now
    assert now["torch"] == torch.__version__
    assert now["threads"] == torch.get_num_threads()
    assert now["instruction_set"].split()[0] == torch.backends.cpu.get_cpu_capability() == now["cpu_capability"]
    assert now["cuda_device"] is None or torch.cuda.is_initialized()
    assert environment_differences(now, now) == []


def test_environment_names_the_commit_of_a_checkout_and_no_other(tmp_path, monkeypatch):
    def run(*command: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    (tmp_path / "bmsn").mkdir()
    source = tmp_path / "bmsn" / "checkpoint.py"
    source.write_text("")
    monkeypatch.setattr(bmsn.checkpoint, "__file__", str(source))
    assert environment()["git_commit"] is None
    run("init", "-q")
    run("add", ".")
    run("commit", "-q", "-m", "all")
    commit = run("rev-parse", "HEAD")
    assert environment()["git_commit"] == commit
    source.write_text("changed")
    assert environment()["git_commit"] == f"{commit}-dirty"


def test_environment_differences_are_the_three_that_matter():
    now = environment()
    other = now | {"threads": 64, "instruction_set": "AVX2", "torch": "2.0", "numpy": "1.0", "cpu_model": "another"}
    other.pop("git_commit")
    assert environment_differences(other, now) == [
        f"threads: 64 when it was saved, {now['threads']} now",
        f"instruction set: AVX2 when it was saved, {now['instruction_set']} now",
        f"torch version: 2.0 when it was saved, {now['torch']} now",
    ]
