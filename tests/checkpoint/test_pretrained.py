"""`save_pretrained`, `push_to_hub`, and what calls them: each ends in `sq_cpu.save`."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_model, byte_tokenizer
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from sameness import assert_same_model
from tiny import batches, logits, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import sq_cpu
from sq_cpu import SqCpuError
from sq_cpu.checkpoint.folder import staged


def quantized(model: Any, scheme: str = "O3") -> Any:
    calibration = sq_cpu.calibrate(model, batches(), progress=False)
    return sq_cpu.quantize(model, calibration, scheme=scheme, progress=False)


@pytest.fixture(scope="module")
def model() -> Any:
    return quantized(byte_model())


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# --- save_pretrained ----------------------------------------------------------------------------


def test_writes_what_save_writes(model: Any, tmp_path: Path) -> None:
    expected = sq_cpu.save(model, tmp_path / "expected", max_shard_size="20KB")
    assert model.save_pretrained(tmp_path / "out", max_shard_size="20KB") is None
    assert names(tmp_path / "out") == names(expected)
    for path in expected.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("load", [sq_cpu.load, AutoModelForCausalLM.from_pretrained])
def test_of_a_loaded_model(load: Any, model: Any, tmp_path: Path) -> None:
    loaded = load(sq_cpu.save(model, tmp_path / "out"))
    loaded.save_pretrained(str(tmp_path / "again"))
    assert_same_model(sq_cpu.load(tmp_path / "again"), model, logits)


def test_takes_what_transformers_takes(model: Any) -> None:
    mine = inspect.signature(model.save_pretrained).parameters
    theirs = list(inspect.signature(PreTrainedModel.save_pretrained).parameters)[1:]
    assert set(theirs) <= set(mine)
    assert list(mine)[:4] == theirs[:4]
    mine = inspect.signature(type(model.push_to_hub).__call__).parameters
    assert set(inspect.signature(PreTrainedModel.push_to_hub).parameters) <= set(mine)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_saves_itself(again: Any, model: Any, tmp_path: Path) -> None:
    other = again(model)
    with torch.no_grad():
        other.model.norm.weight += 1
    other.save_pretrained(tmp_path / "out")
    assert_same_model(sq_cpu.load(tmp_path / "out"), other, logits)


def test_does_not_keep_the_model() -> None:
    model = quantized(tiny_model("llama"))
    save, gone = model.save_pretrained, weakref.ref(model)
    del model
    assert gone() is None  # at once: no cycle
    with pytest.raises(SqCpuError, match="is gone"):
        save("out")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"state_dict": {}}, "state_dict"),
        ({"variant": "fp16"}, "variant"),
        ({"distributed_checkpoint": True}, "distributed_checkpoint"),
        ({"safe_serialization": False}, "safe_serialization=False"),
        ({"commit_message": "x"}, "commit_message"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_is_refused(given: Any, named: str, model: Any, tmp_path: Path) -> None:
    with pytest.raises(SqCpuError, match=f"cannot follow {named}: leave it out"):
        model.save_pretrained(tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_another_process_writes(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_files_beside_stay(model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    byte_model().save_pretrained(folder, max_shard_size="20KB")  # a float model, in other files
    byte_tokenizer().save_pretrained(folder)
    (folder / "runs").mkdir()
    (folder / "runs" / "log").write_text("x")
    (folder / "model.bin").write_text("x")
    beside = {"tokenizer.json", "tokenizer_config.json", "runs", "runs/log", "model.bin"}
    for size in ("20KB", "5GB"):
        model.save_pretrained(folder, max_shard_size=size)
        expected = sq_cpu.save(model, tmp_path / size, max_shard_size=size)
        assert names(folder) == names(expected) | beside
        assert_same_model(sq_cpu.load(folder), model, logits)
        assert_same_model(AutoModelForCausalLM.from_pretrained(folder), model, logits)
    with pytest.raises(SqCpuError, match="did not write and will not delete"):
        sq_cpu.save(model, folder)


def test_what_save_wrote_there_stays_of_its_making(model: Any, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    folder = sq_cpu.save(model, tmp_path / "out", tokenizer, max_shard_size="20KB")
    (folder / "search_curves.json").write_text("of an earlier search")
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"]["companions"].append("search_curves.json")
    (folder / "config.json").write_text(json.dumps(settings))
    model.save_pretrained(folder)
    expected = sq_cpu.save(model, tmp_path / "expected", tokenizer)
    assert names(folder) == names(expected)
    for name in names(folder):
        assert (folder / name).read_bytes() == (expected / name).read_bytes()
    sq_cpu.save(model, folder)
    assert "tokenizer.json" not in names(folder)


def test_a_config_that_models_share_stays_a_float_one(tmp_path: Path) -> None:
    model = byte_model()
    other = type(model)(model.config)
    assert other.config is model.config
    quantized(model)
    assert all(
        module.config is model.config for module in model.modules() if hasattr(module, "config")
    )
    other.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_without_config_json_while_files_are_replaced(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sq_cpu.save(model, tmp_path / "out")
    (folder / "mine").write_text("x")
    rename, seen = Path.rename, []

    def watched(self: Path, target: Path) -> Path:
        seen.append((self.name, (folder / "config.json").exists()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    model.save_pretrained(folder)
    names = [name for name, _ in seen]
    assert (names[0], names[-1]) == ("config.json", "config.json")
    assert [there for _, there in seen] == [True, *[False] * (len(seen) - 1)]
    assert (folder / "mine").exists()


@pytest.mark.parametrize("at", [1, 2, 4, 6])
def test_what_was_there_is_put_back(
    at: int, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    byte_model().save_pretrained(folder, max_shard_size="20KB")
    (folder / "mine").write_text("x")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rename, calls = Path.rename, 0

    def interrupted(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    # Killed there, with no time to put anything back, the next call does it.
    old = tmp_path / ".out.partial" / "old"
    old.mkdir(parents=True)
    (folder / "config.json").rename(old / "config.json")
    with staged(folder, keep=True):
        assert (folder / "config.json").read_bytes() == before["config.json"]


def test_a_folder_in_the_way_is_named(model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    byte_model().save_pretrained(folder)
    (folder / "README.md").mkdir()
    before = names(folder)
    with pytest.raises(SqCpuError, match=r"README.md is a folder, where a file is to be: move it"):
        model.save_pretrained(folder)
    assert names(folder) == before


# --- what calls it ------------------------------------------------------------------------------


def test_trainer(model: Any, tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    texts = [{"input_ids": ids, "labels": ids} for ids in batches(1)[0]]
    trainer = Trainer(
        model=model, args=arguments, eval_dataset=texts, processing_class=byte_tokenizer()
    )
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.save_model()
    trainer.save_model()  # beside the tokenizer's files
    assert {"tokenizer.json", "training_args.bin"} <= names(tmp_path)
    assert_same_model(sq_cpu.load(tmp_path), model, logits)


def test_sentence_transformer(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_hidden_layers=2,
        )
    ).save_pretrained(tmp_path / "float")
    byte_tokenizer().save_pretrained(tmp_path / "float")
    module = Transformer(str(tmp_path / "float"))
    model = SentenceTransformer(modules=[module, Pooling(32)], device="cpu")
    texts = ["one text", "and another"]
    calibration = sq_cpu.calibrate(module.model, batches(), progress=False)
    sq_cpu.quantize(module.model, calibration, scheme="O1", progress=False)
    expected = model.encode(texts, convert_to_tensor=True)
    for _ in range(2):
        model.save(str(tmp_path / "out"))
    found = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert_same_model(found[0].model, module.model)
    torch.testing.assert_close(found.encode(texts, convert_to_tensor=True), expected)


# --- the hub ------------------------------------------------------------------------------------


class Hub:
    """The repositories that a client's calls would make."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.calls = root, dict[str, Any]()
        for name in ("create_repo", "file_exists", "upload_folder"):
            monkeypatch.setattr(HfApi, name, getattr(self, name))

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls["create_repo"] = options
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return type("RepoUrl", (str,), {"repo_id": f"me/{repo_id}"})("url")

    def file_exists(self, repo_id: str, name: str, **_: Any) -> bool:
        return (self.root / repo_id.removeprefix("me/") / name).exists()

    def upload_folder(
        self,
        *,
        folder_path: Path,
        repo_id: str,
        allow_patterns: Any,
        ignore_patterns: Any,
        **options: Any,
    ) -> str:
        self.calls["upload_folder"] = options
        target = self.root / repo_id.removeprefix("me/")
        files = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*")]
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for name in filter_repo_objects(files, **patterns):
            shutil.copyfile(folder_path / name, target / name)
        return "https://hub/commit"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tmp_path / "hub", monkeypatch)


def test_push_to_hub(hub: Hub, model: Any) -> None:
    url = model.push_to_hub(
        "int8", commit_message="first", private=True, create_pr=True, max_shard_size="20KB"
    )
    assert url == "https://hub/commit"
    assert hub.calls["create_repo"]["private"] is True
    assert hub.calls["upload_folder"]["commit_message"] == "first"
    assert hub.calls["upload_folder"]["create_pr"] is True
    assert len(list((hub.root / "int8").glob("*.safetensors"))) > 1
    assert_same_model(AutoModelForCausalLM.from_pretrained(hub.root / "int8"), model, logits)


def test_saved_and_pushed(hub: Hub, model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "name", push_to_hub=True, commit_message="first")
    model.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="other", token="t")
    for repository in ("name", "other"):
        assert_same_model(sq_cpu.load(hub.root / repository), model, logits)


def test_what_lies_beside_is_not_pushed(hub: Hub, model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "name"
    (folder / "checkpoint-1").mkdir(parents=True)
    for secret in (".env", "checkpoint-1/optimizer.pt"):
        (folder / secret).write_text("x")
    model.save_pretrained(folder, push_to_hub=True)
    assert names(hub.root / "name") == names(folder) - {
        *(".env", "checkpoint-1", "checkpoint-1/optimizer.pt")
    }
    assert_same_model(sq_cpu.load(hub.root / "name"), model, logits)


def test_generation_after_quantize(model: Any) -> None:
    # What transformers asks of `hf_quantizer` and the config on its way.
    ids = batches(1)[0]
    made: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False
    )
    assert made.shape[1] > ids.shape[1]
    assert "sq_cpu" in model.config.to_json_string()
