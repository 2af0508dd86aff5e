"""Gradients of a sampled loss: what the calibration keeps is what autograd says."""

from typing import Any

import pytest
import torch
from tiny import batches, tiny_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sq_cpu
from sq_cpu import Calibration, SqCpuError
from sq_cpu.models.linears import linearized, quantizable_linears


def expected(model: nn.Module, name: str, batch: Any, labels: Tensor, kept: Tensor) -> Tensor:
    """Return the gradient of the loss by what is added to one linear's output: [rows, out]."""
    added: list[Tensor] = []

    def add(_module: nn.Module, _args: Any, y: Tensor) -> Tensor:
        added.append(torch.zeros_like(y, requires_grad=True))
        return y + added[0]

    with linearized(model):
        handle = model.get_submodule(name).register_forward_hook(add)
        logits = model(**batch).logits
        handle.remove()
    loss = cross_entropy(logits.reshape(-1, logits.shape[-1])[kept], labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, added)
    return gradient.reshape(-1, gradient.shape[-1])[kept]


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_autograd(model_type: str, padded: bool) -> None:
    model = tiny_model(model_type).eval()
    ids = batches(1)[0]
    mask = torch.ones_like(ids)
    if padded:
        mask[:, -5:] = 0
    kept = mask.reshape(-1).bool()
    batch = {"input_ids": ids, "attention_mask": mask}
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    calibration = sq_cpu.calibrate(model, [batch], rows=10_000, gradient_rows=10_000)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        logits = model(**batch).logits.reshape(-1, model.config.vocab_size)[kept]
        generator = torch.Generator().manual_seed(0)
        labels = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    with linearized(model):
        names = list(quantizable_linears(model, ("lm_head",)))
    assert set(calibration.gradients) == set(names)
    for name in names:
        wanted = expected(model, name, batch, labels, kept)
        order = torch.rand(len(wanted), generator=torch.Generator().manual_seed(0)).argsort(
            descending=True
        )
        rows = calibration.rows[name][order.argsort()]
        # All are kept, in an order of their own, and stand for themselves.
        same = (calibration.gradient_rows[name][:, None] == rows).all(dim=2)
        close = torch.isclose(calibration.gradients[name][:, None], wanted, rtol=1e-4, atol=1e-6)
        pairs = same & close.all(dim=2)
        assert len(pairs) == len(rows)
        assert pairs.any(dim=0).all()
        assert pairs.any(dim=1).all()
        assert (calibration.gradient_weights[name] == 1).all()


def test_a_sample_of_rows_keeps_their_gradients(tmp_path: Any) -> None:
    model = tiny_model("llama").eval()
    data = batches(5)
    everything = sq_cpu.calibrate(model, data, rows=10_000, gradient_rows=10_000)
    some = sq_cpu.calibrate(model, data, rows=9, gradient_rows=11)
    plain = sq_cpu.calibrate(model, data, rows=9)
    for name, rows in some.rows.items():
        assert torch.equal(rows, plain.rows[name])
        pairs = torch.cat([everything.gradient_rows[name], everything.gradients[name]], dim=1)
        found = torch.cat([some.gradient_rows[name], some.gradients[name]], dim=1)
        assert (len(rows), len(found)) == (9, 11)
        assert all((pairs == pair).all(dim=1).any() for pair in found)
        assert set(some.gradient_folds[name].tolist()) <= {0, 1, 2, 3}
    again = Calibration.load(some.save(tmp_path / "calibration"))
    for kind in (
        "rows",
        "row_folds",
        "gradient_rows",
        "gradients",
        "gradient_weights",
        "gradient_folds",
        "fold_min",
        "fold_max",
        "channel_min",
    ):
        kept, loaded = getattr(some, kind), getattr(again, kind)
        assert kept.keys() == loaded.keys()
        assert all(torch.equal(kept[name], loaded[name]) for name in kept)


def test_weights_make_sums_over_rows_unbiased() -> None:
    # 80 linears see rows of very different gradients, and 20 of 400 are kept of each.
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = nn.ModuleList(nn.Linear(4, 4) for _ in range(80))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([linear(x) * x[:, :1].exp() for linear in self.linears])

    torch.manual_seed(0)
    model, x = Scaled(), 2 * torch.randn(400, 4)
    sums = [
        torch.tensor(
            [
                float((found.gradient_weights[name] * gradients.norm(dim=1)).sum())
                for name, gradients in found.gradients.items()
            ]
        )
        for found in (
            sq_cpu.calibrate(model, [x], ignore=(), gradient_rows=count) for count in (400, 20)
        )
    ]
    ratio = sums[1] / sums[0]
    assert abs(float(ratio.mean()) - 1) < 3 * float(ratio.std()) / len(ratio) ** 0.5
    assert float(ratio.std()) < 0.2  # of 20 uniformly drawn rows it would be above 0.4


def test_rows_that_make_the_range_are_kept() -> None:
    # Gradients are noise of one size here: what tells the rows apart is how near they come.
    torch.manual_seed(0)
    x = 0.01 * torch.randn(400, 1)
    x[[7, 90, 211, 399]] = 1.0
    found = sq_cpu.calibrate(nn.Sequential(nn.Linear(1, 16)), [x], ignore=(), gradient_rows=20)
    assert int((found.gradient_rows["0"] == 1).sum()) == 4


def test_outputs_that_are_no_logits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(6, 8)
    found = sq_cpu.calibrate(model, [x], ignore=(), gradient_rows=6)
    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.gradients["2"].sort(dim=0).values, noise.sort(dim=0).values)


class Parts(nn.Module):
    """Two linears; what the loss does not see of them is up to `forward`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


class Detached(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).detach()  # type: ignore[no-any-return]


class WithoutGradients(Parts):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


class Aside(Parts):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            aside = self.first(x)
        return {"main": self.second(x), "aside": aside}


class Unseen(Parts):
    def forward(self, x: Tensor) -> Tensor:
        self.first(x)
        return self.second(x)  # type: ignore[no-any-return]


class Doubling(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x *= 2
        return y + self.second(x)  # type: ignore[no-any-return]


class Steep(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x) * 0).sqrt() + self.second(x)  # type: ignore[no-any-return]


class InPlace(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += self.second(x)
        return y  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [Detached(), WithoutGradients()])
def test_a_model_without_a_graph_is_refused(model: nn.Module) -> None:
    with pytest.raises(SqCpuError, match="calibrate with gradient_rows=0"):
        sq_cpu.calibrate(model, [torch.randn(2, 4)], ignore=(), gradient_rows=8)


def test_a_part_without_a_graph_has_no_gradients() -> None:
    x = torch.randn(8, 4)
    found = sq_cpu.calibrate(Aside(), [x], ignore=(), gradient_rows=8)
    assert found.gradients.keys() == found.gradient_rows.keys() == {"second"}
    assert found.gradients["second"].any()
    scheme = sq_cpu.Scheme.of("O3", ignore=())
    with pytest.raises(SqCpuError, match="no gradients of first"):
        sq_cpu.tune(Aside(), found, scheme=scheme)
    assert len(sq_cpu.tune(Aside(), found, scheme=scheme, loss="nmse").groups) == 2


def test_what_the_loss_does_not_see_costs_nothing() -> None:
    found = sq_cpu.calibrate(Unseen(), [torch.randn(8, 4)], ignore=(), gradient_rows=8)
    assert found.gradients["first"].shape == (0, 4)
    assert found.gradients["second"].shape == (8, 4)
    plan = sq_cpu.tune(Unseen(), found, scheme=sq_cpu.Scheme.of("O3", ignore=()))
    (group,) = (group for group in plan.groups if "first" in group.name)
    assert group.alpha == 0.5
    assert group.note.endswith("kl 0")


def test_inputs_that_are_changed_in_place() -> None:
    x = torch.randn(8, 4)
    found = sq_cpu.calibrate(Doubling(), [x.clone()], ignore=(), gradient_rows=8)
    for name, rows in (("first", x), ("second", 2 * x)):
        assert torch.equal(found.gradient_rows[name].sort(dim=0).values, rows.sort(dim=0).values)


def test_infinite_gradients_are_refused() -> None:
    with pytest.raises(SqCpuError, match="NaN or Inf in the gradient of first"):
        sq_cpu.calibrate(Steep(), [torch.randn(8, 4)], ignore=(), gradient_rows=8)


def test_negative_numbers_of_rows() -> None:
    with pytest.raises(SqCpuError, match="gradient_rows is -1, not a whole number >= 0"):
        sq_cpu.calibrate(Aside(), [torch.randn(8, 4)], ignore=(), gradient_rows=-1)


def test_outputs_that_are_changed_in_place() -> None:
    found = sq_cpu.calibrate(InPlace(), [torch.randn(8, 4)], ignore=(), gradient_rows=8)
    # The rows of each are drawn for themselves, here from one list.
    first, second = (found.gradients[name].sort(dim=0).values for name in ("first", "second"))
    assert torch.equal(first, second)
    assert found.gradients["first"].any()
