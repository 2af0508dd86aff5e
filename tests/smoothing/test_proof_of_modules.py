"""The proof of folds on modules that no row of ours has."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sq_cpu.models.calls import evaluating
from sq_cpu.models.groups import Layout, SmoothingGroup, smoothing_groups
from sq_cpu.smoothing.proof import prove_folds, refused_folds


class Pair(nn.Module):
    """A producer and a linear that reads what it gives."""

    def __init__(self, producer: nn.Module) -> None:
        super().__init__()
        self.producer = producer
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.producer(x))
        return result


def pair_refusal(model: nn.Module, *shape: int, outputs: Any = list) -> str:
    group = SmoothingGroup("p", ("linear",), Layout(1, 0, 8), producer="producer")
    x = torch.randn(shape)
    s = torch.linspace(0.5, 2.0, 8)
    with evaluating(model):
        proof = prove_folds(model, [group], lambda: outputs([model(x)]))
        return refused_folds(model, {group: s}, proof).get(group, "")


def test_outputs_without_a_tensor_prove_nothing() -> None:
    model = Pair(nn.Linear(8, 8))
    assert pair_refusal(model, 2, 8) == ""
    reason = pair_refusal(model, 2, 8, outputs=lambda _: [])
    assert reason == "the model returns no tensor that could be compared"


def test_a_norm_called_by_keyword_is_proven() -> None:
    class ByKeyword(Pair):
        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.linear(input=self.producer(input=x))
            return result

    assert pair_refusal(ByKeyword(nn.LayerNorm(8)), 2, 8) == ""


class Twice(nn.LayerNorm):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_a_producer_whose_channels_are_not_last_is_refused() -> None:
    reason = "producer does not return a tensor with its channels last"

    class First(Pair):
        def forward(self, x: Tensor) -> Tensor:
            y = self.producer(x)
            y = y[0] if isinstance(y, tuple) else y.movedim(1, -1)
            result: Tensor = self.linear(y)
            return result

    assert pair_refusal(First(nn.GroupNorm(2, 8)), 2, 8, 5) == reason
    assert pair_refusal(First(Twice(8)), 2, 8) == reason


def test_what_a_model_draws_at_random_is_the_same_in_every_run() -> None:
    class Noisy(Pair):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(8)

    model = Noisy(nn.LayerNorm(8))
    torch.manual_seed(5)
    assert pair_refusal(model, 2, 8) == ""
    after = torch.get_rng_state()
    torch.manual_seed(5)
    torch.randn(2, 8)  # all that was drawn outside of the proof
    assert torch.equal(torch.get_rng_state(), after)


def test_a_weight_that_is_computed_takes_no_scale() -> None:
    model = tiny_model("llama")
    weight_norm(model.model.layers[0].self_attn.v_proj)
    group = next(g for g in smoothing_groups(model) if "layers.0.self_attn.o_proj" in g.name)
    assert group.reason.endswith("v_proj has no weight that could take the scale")
