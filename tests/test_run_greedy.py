"""The benchmark of greedy texts, on a tiny model."""

import pytest
import run_greedy
import torch
from tiny import batches, tiny_model

import sq_cpu
from sq_cpu.inference.fusing import fused_of


def test_it_compares_three_ways() -> None:
    model = tiny_model("llama")
    sq_cpu.quantize(model, sq_cpu.calibrate(model, batches()), head="int8")
    prompts = [ids[:1, :8] for ids in batches()]
    rows = run_greedy.compare(model, prompts, 12)
    assert [(row["reference"], row["subject"]) for row in rows] == list(run_greedy.PAIRS)
    for row in rows:
        assert row["equal"] + len(row["gaps"]) == len(prompts)
        assert row["noise"] > 0  # they are different computations
        assert 0 <= row["largest_gap"] < 10 * row["noise"]
    assert fused_of(model) is None
    assert model.config._attn_implementation != "sq_cpu"


def test_a_gap_is_what_the_reference_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    class Chooser(torch.nn.Module):
        way = ""

    chooser = Chooser()
    texts = {"float attention": [5, 6, 7], "int8 attention": [5, 6, 7], "fused": [5, 8, 1]}

    def continued(model: Chooser, _: torch.Tensor, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor(texts[model.way])
        logits = torch.zeros(new, 10)
        logits[range(new), ids] = 0.25
        return ids, logits

    def switch(model: Chooser, way: str) -> None:
        model.way = way

    monkeypatch.setattr(run_greedy, "continued", continued)
    monkeypatch.setattr(run_greedy, "switch", switch)
    rows = run_greedy.compare(chooser, [torch.zeros(1, 1)], 3)
    assert [row["equal"] for row in rows] == [0, 1, 0]
    assert [row["equal_tokens"] for row in rows] == [1, 3, 1]
    assert [row["largest_gap"] for row in rows] == [0.25, 0, 0.25]
