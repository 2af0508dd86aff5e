"""Gradients of a sampled loss: what the calibration keeps is what autograd says."""

from typing import Any

import pytest
import torch
from tiny import batches, tiny_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import sq_cpu
from sq_cpu import Calibration, SqCpuError
from sq_cpu.linears import linearized, quantizable_linears


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
    calibration = sq_cpu.calibrate(model, [batch], rows=10_000, gradients=True)
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
        rows, gradients = calibration.rows[name], calibration.gradients[name]
        wanted = expected(model, name, batch, labels, kept)
        assert len(rows) == len(wanted)
        assert len(gradients) == len(rows) + len(calibration.peaks[name])
        # The sample has an order of its own, the same for rows and gradients.
        plain = sq_cpu.calibrate(model, [batch], rows=10_000)
        assert torch.equal(plain.rows[name], rows)
        order = torch.rand(len(rows), generator=torch.Generator().manual_seed(0)).argsort(
            descending=True
        )
        torch.testing.assert_close(gradients[: len(rows)], wanted[order], rtol=1e-4, atol=1e-6)
        # All are kept, so the peaks are of the sample too, which then stands for nothing there.
        assert float(calibration.row_weights[name].sum()) == pytest.approx(len(rows))
        peaks = calibration.peaks[name]
        for peak, gradient in zip(peaks, gradients[len(rows) :], strict=True):
            same = (rows == peak).all(dim=1)
            assert same.any()
            assert (gradients[: len(rows)][same] == gradient).all(dim=1).any()


def test_a_sample_of_rows_keeps_their_gradients(tmp_path: Any) -> None:
    model = tiny_model("llama").eval()
    data = batches(5)
    everything = sq_cpu.calibrate(model, data, rows=10_000, gradients=True)
    some = sq_cpu.calibrate(model, data, rows=9, gradients=True)
    for name, rows in some.rows.items():
        peaks = some.peaks[name]
        assert (len(rows), len(peaks), len(some.gradients[name])) == (9, 2, 11)
        absmax = everything.rows[name].abs().amax(dim=1)
        assert sorted(peaks.abs().amax(dim=1).tolist()) == absmax.sort().values[-2:].tolist()
        assert float(some.row_weights[name].sum()) == pytest.approx(len(everything.rows[name]))
        assert set(some.row_folds[name].tolist()) <= {0, 1, 2, 3}
        count = len(everything.rows[name])
        pairs = torch.cat([everything.rows[name], everything.gradients[name][:count]], dim=1)
        for pair in torch.cat([torch.cat([rows, peaks]), some.gradients[name]], dim=1):
            assert (pairs == pair).all(dim=1).any()
    again = Calibration.load(some.save(tmp_path / "calibration"))
    for kind in (
        "rows",
        "peaks",
        "gradients",
        "row_weights",
        "row_folds",
        "fold_min",
        "fold_max",
        "channel_min",
    ):
        kept, loaded = getattr(some, kind), getattr(again, kind)
        assert kept.keys() == loaded.keys()
        assert all(torch.equal(kept[name], loaded[name]) for name in kept)


def test_outputs_that_are_no_logits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(6, 8)
    found = sq_cpu.calibrate(model, [x], ignore=(), rows=6, gradients=True)
    noise = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    order = torch.rand(6, generator=torch.Generator().manual_seed(0)).argsort(descending=True)
    assert torch.equal(found.gradients["2"][:6], noise[order])


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


class InPlace(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y += self.second(x)
        return y  # type: ignore[no-any-return]


@pytest.mark.parametrize("model", [Detached(), WithoutGradients()])
def test_a_model_without_a_graph_is_refused(model: nn.Module) -> None:
    with pytest.raises(SqCpuError, match="calibrate without gradients"):
        sq_cpu.calibrate(model, [torch.randn(2, 4)], ignore=(), gradients=True)


def test_what_the_loss_does_not_see_has_no_gradient() -> None:
    x = torch.randn(8, 4)
    found = sq_cpu.calibrate(Aside(), [x], ignore=(), rows=8, gradients=True)
    assert not found.gradients["first"].any()
    assert found.gradients["second"].any()
    scheme = sq_cpu.Scheme.of("O3", ignore=())
    assert len(sq_cpu.tune(Aside(), found, scheme=scheme).groups) == 2


def test_outputs_that_are_changed_in_place() -> None:
    found = sq_cpu.calibrate(InPlace(), [torch.randn(8, 4)], ignore=(), rows=8, gradients=True)
    assert torch.equal(found.gradients["first"], found.gradients["second"])
    assert found.gradients["first"].any()
