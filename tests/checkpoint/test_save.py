"""What `save` writes: all or nothing, and only over what is its own."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
from safetensors.torch import save_file
from sameness import assert_same_model
from tiny_checkpoints import fails, logits, tiny_llama
from torch import Tensor, nn

from sq_cpu.checkpoint import folder as staging
from sq_cpu.checkpoint import save as saving
from sq_cpu.checkpoint.load import load
from sq_cpu.checkpoint.save import save
from sq_cpu.quantization.quantize import quantize


def test_save_refuses_a_float_model(tmp_path: Path) -> None:
    fails("not quantized by sq_cpu", save, tiny_llama(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_save_replaces_its_own_checkpoint(quantized_llama: Any, tmp_path: Path) -> None:
    folder = save(quantized_llama, tmp_path / "out", max_shard_size=6000)
    save(quantized_llama, folder)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "README.md",
        "generation_config.json",
        "model.safetensors",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_save_into_an_empty_folder_and_through_a_link(quantized_llama: Any, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(quantized_llama, tmp_path / "link")
    save(quantized_llama, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same_model(load(tmp_path / "real"), quantized_llama, logits)


def test_save_makes_parents(quantized_llama: Any, tmp_path: Path) -> None:
    save(quantized_llama, tmp_path / "a" / "b" / "out")
    load(tmp_path / "a" / "b" / "out")


@pytest.mark.parametrize("name", ["notes.txt", "model-00001-of-00002.safetensors"])
def test_save_keeps_a_folder_that_holds_other_files(folder: Path, name: str) -> None:
    (folder / name).write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fails(f"holds {name}", save, load(folder), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_save_keeps_a_float_checkpoint(quantized_llama: Any, tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "float")
    before = {path.name: path.read_bytes() for path in (tmp_path / "float").iterdir()}
    fails("not an sq_cpu checkpoint", save, quantized_llama, tmp_path / "float")
    assert {p.name: p.read_bytes() for p in (tmp_path / "float").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_save_refuses_a_file_and_a_parent_that_is_one(quantized_llama: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    fails("is a file", save, quantized_llama, tmp_path / "file")
    fails("cannot write checkpoint", save, quantized_llama, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_save_into_an_unwritable_folder(quantized_llama: Any) -> None:
    # Nobody can make a folder there, not even root.
    fails("cannot write checkpoint", save, quantized_llama, Path("/proc/sq_cpu/out"))


def fail_at(call: int, error: BaseException, function: Callable[..., Any]) -> Callable[..., Any]:
    """Give `function`, which raises `error` at its n-th call."""
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return function(*args, **kwargs)

    return wrapper


@pytest.mark.parametrize("over", ["nothing", "new parents", "a checkpoint"])
def test_full_disk_leaves_nothing_behind(
    quantized_llama: Any, over: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a" / "b" / "out" if over == "new parents" else tmp_path / "out"
    if over == "a checkpoint":
        save(quantized_llama, target)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(saving, "save_file", fail_at(2, full, save_file))
    fails("No space left on device", save, quantized_llama, target, max_shard_size=6000)

    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_interruption_leaves_nothing_behind(
    quantized_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "save_file", fail_at(1, KeyboardInterrupt(), save_file))
    with pytest.raises(KeyboardInterrupt):
        save(quantized_llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_save_fills_an_empty_folder_in_place(
    quantized_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    save(quantized_llama, ".")
    assert tmp_path.stat().st_ino == inode
    assert_same_model(load("."), quantized_llama, logits)
    # What is there now could only be replaced with the folder.
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fails("mount point or the current folder", save, quantized_llama, ".")
    monkeypatch.chdir("/")
    fails("mount point or the current folder", save, quantized_llama, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("call", [1, 2, 3])
def test_failed_fill_leaves_the_folder_empty(
    quantized_llama: Any, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Path, "rename", fail_at(call, full, Path.rename))
    fails("No space left on device", save, quantized_llama, tmp_path)
    assert not list(tmp_path.iterdir())


def test_save_replaces_folders_within_its_own_checkpoint_alone(
    quantized_llama: Any, tmp_path: Path
) -> None:
    class Nested:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "templates").mkdir()
            (folder / "templates" / "chat.jinja").write_text("x")

    folder = save(quantized_llama, tmp_path / "out", Nested())
    save(quantized_llama, folder, Nested())
    load(folder)
    (folder / "templates" / "mine").mkdir()
    fails("holds templates/mine", save, quantized_llama, folder)
    (folder / "templates" / "mine").rmdir()


def test_failed_move_restores_the_old_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "exchange", lambda *_: False)  # as some file systems
    model = load(folder)
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    busy = OSError(errno.EBUSY, "Device or resource busy")
    monkeypatch.setattr(Path, "rename", fail_at(2, busy, Path.rename))
    fails("resource busy", save, model, folder)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


class _Foreign(Tensor):
    """As torchao's tensors are."""


def test_tensors_of_other_libraries_are_refused(tmp_path: Path) -> None:
    model: Any = quantize(tiny_llama(), smooth=False)
    head = model.lm_head
    head.weight = nn.Parameter(head.weight.detach().clone().as_subclass(_Foreign))
    head.extra_repr = MethodType(partial(repr), head)
    match = "lm_head.weight is a .*_Foreign, which checkpoints do not hold: save the model before"
    fails(match, save, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
