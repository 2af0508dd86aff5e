"""Alphas and clips that gradients move."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import batches, tiny_model
from tuning_cases import logit_error, planted

import sq_cpu
from sq_cpu import Scheme, SqCpuError
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.numerics.fake_quant import FakeQuantizedLinear, LinearSample
from sq_cpu.numerics.straight_through import quantized_rows, quantized_weight
from sq_cpu.smoothing.scales import group_statistics
from sq_cpu.tuning.learned import _Group, learn

SCHEMES = {
    "per token": Scheme.of("O1"),
    "per tensor": Scheme.of("O2"),
    "static": Scheme.of("O3"),
    "asymmetric": Scheme.of("O1", symmetric=False),
    "asymmetric static": Scheme.of("O3", symmetric=False),
    "static alone": Scheme.of("O3", dynamic_fallback=False),
    "7 bits": Scheme.of("O3", reduce_range=True),
    "two terms": Scheme(activations="per_token_x2"),
    "a scale for the weight": Scheme(weights="per_tensor"),
    "a scale for two rows": Scheme(weights="per_rows", rows_per_scale=2),
}


@pytest.mark.parametrize("hadamard", [0, 64])
@pytest.mark.parametrize("name", SCHEMES)
def test_what_gradients_pass_through_is_what_the_kernels_compute(name: str, hadamard: int) -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(7, 70), torch.randn(20, 70)
    rows[3] /= 100  # underflows
    sample = LinearSample(
        weight, rows, rows.amin(0), rows.amax(0), peaks=rows, weight_clip=0.9, name="linear"
    )
    s = torch.rand(70) + 0.5
    fake = FakeQuantizedLinear(sample, s, SCHEMES[name], clip=0.8, hadamard=hadamard)
    static = fake.scheme.activations == "static"
    ends = tuple(map(torch.tensor, fake.range)) if static else None
    made = quantized_rows(fake.coded(rows), fake.scheme, ends)
    # Beside ties: a step is 0.03, and that of the second term 1e-4.
    torch.testing.assert_close(made, fake.quantize(rows), rtol=0, atol=2e-4)
    through = quantized_weight(fake.coded_weight(), fake.scheme, 0.9)
    torch.testing.assert_close(through, fake.weight)


def test_a_scale_has_the_gradient_of_lsq() -> None:
    high = torch.tensor(12.7, requires_grad=True)  # a scale of 0.1
    x, scheme = torch.tensor([[0.26, -0.04, 20.0]]), Scheme.of("O3", dynamic_fallback=False)
    quantized_rows(x, scheme, (-high.detach() / 2, high))[0, 0].backward()
    torch.testing.assert_close(high.grad, torch.tensor((3 - 2.6) / 127))
    high.grad = None
    quantized_rows(x, scheme, (-high.detach() / 2, high))[0, 2].backward()
    torch.testing.assert_close(high.grad, torch.tensor(1.0))


MINMAX = Scheme.of("O3", static_range="minmax")
"""Whose clips are learned: the default's range is what most rows fit."""


def far(model: torch.nn.Module, calibration: sq_cpu.Calibration) -> sq_cpu.SmoothPlan:
    """Return a plan whose clips are much too wide."""
    plan = sq_cpu.SmoothPlan.uniform(model, calibration, alpha=0.1)
    return replace(plan, groups=tuple(replace(group, clip=2.0) for group in plan.groups))


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_a_learned_plan_is_better_on_batches_that_nobody_saw(model_type: str) -> None:
    model, data = planted(model_type), batches(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibration = sq_cpu.calibrate(model, data, rows=32)
    plan = far(model, calibration)
    learned = learn(model, calibration, plan, data, scheme=MINMAX, steps=40)
    assert learned.after < 0.8 * learned.before
    assert logit_error(model_type, learned.plan, calibration, MINMAX) < 0.8 * logit_error(
        model_type, plan, calibration, MINMAX
    )
    assert all(0 <= group.alpha <= 1 and group.clip < 2 for group in learned.plan.groups)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_does_not_help_is_not_kept() -> None:
    model, data = planted("llama"), batches(2)
    calibration = sq_cpu.calibrate(model, data, rows=32)
    plan = learn(model, calibration, far(model, calibration), data, scheme="O3", steps=60).plan
    again = learn(model, calibration, plan, data, scheme="O3", steps=1)
    assert again.after <= again.before
    assert again.plan == plan or again.after < again.before


def test_only_what_the_plan_leaves_open_moves() -> None:
    model, data = planted("llama"), batches(2)
    calibration = sq_cpu.calibrate(model, data, rows=32)
    plan = sq_cpu.SmoothPlan.uniform(model, calibration, rule="spiq", hadamard=0)
    plan = replace(plan, groups=tuple(replace(group, clip=2.0) for group in plan.groups))
    learned = learn(model, calibration, plan, data, scheme=MINMAX, steps=20)
    assert learned.after < learned.before
    for group, old in zip(learned.plan.groups, plan.groups, strict=True):
        assert replace(group, clip=2.0) == old
    for scheme in ("O1", "O3"):
        with pytest.raises(SqCpuError, match="nothing to learn"):
            learn(model, calibration, plan, data, scheme=scheme)
    mixed = far(model, calibration)
    linear = mixed.groups[0].name.replace("input_layernorm", "self_attn.q_proj")
    mixed = replace(mixed, layers=(sq_cpu.LayerPlan(name=linear, outliers=(3, 17)),))
    learned = learn(model, calibration, mixed, data, scheme="O1", steps=20)
    assert learned.plan.layers == mixed.layers
    assert all(group.clip == 2.0 for group in learned.plan.groups)


def test_padding_and_other_models_than_of_language() -> None:
    model, data = planted("llama"), batches(2)
    mask = torch.ones_like(data[0])
    mask[1, 10:] = 0
    masked = [{"input_ids": ids.where(mask > 0, 0), "attention_mask": mask} for ids in data]
    calibration = sq_cpu.calibrate(model, masked, rows=32)
    plan = far(model, calibration)
    learned = learn(model, calibration, plan, masked, scheme="O3", steps=8)
    changed = [{**b, "input_ids": b["input_ids"].where(mask > 0, 5)} for b in masked]
    assert learn(model, calibration, plan, changed, scheme="O3", steps=8).before == pytest.approx(
        learned.before
    )
    encoder = tiny_model("bert")
    calibration = sq_cpu.calibrate(encoder, data, rows=32)
    learned = learn(encoder, calibration, far(encoder, calibration), data, scheme="O3", steps=20)
    assert learned.after < learned.before


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_that_most_rows_fit_follows_alpha(symmetric: bool) -> None:
    model, data = planted("llama"), batches(3)
    calibration = sq_cpu.calibrate(model, data, rows=32)
    scheme = Scheme.of("O3", symmetric=symmetric).resolve(True)
    plan = sq_cpu.SmoothPlan.uniform(model, calibration, alpha=0.1, hadamard=64)
    by_name = {group.name: group for group in smoothing_groups(model)}
    for planned in plan.groups:
        statistics = group_statistics(model, by_name[planned.name], calibration, scheme)
        group = _Group(statistics, planned)
        assert group.parameters() == [group.alpha]
        with torch.no_grad():
            group.alpha += 0.5
        for fake in group.linears():
            low, high = group.ends(fake)
            found = replace(fake, s=fake.s.detach()).range
            assert (low.item(), high.item()) == pytest.approx(found, rel=1e-5)
            (slope,) = torch.autograd.grad(high - low, group.alpha, retain_graph=True)
            assert slope.isfinite()
            assert slope != 0
    learned = learn(model, calibration, plan, data, scheme=scheme, steps=40)
    assert learned.after < 0.95 * learned.before
    assert all(group.clip == 1 for group in learned.plan.groups)


@pytest.mark.parametrize("scheme", [Scheme.of("O3"), MINMAX], ids=["auto", "minmax"])
@pytest.mark.parametrize("prefix", [(), (1, 5)])
@pytest.mark.parametrize("model_type", ["llama", "opt", "mixtral"])
def test_a_plan_loses_what_the_quantized_model_does(
    model_type: str, prefix: tuple[int, ...], scheme: Scheme
) -> None:
    model, data = planted(model_type), batches(2)
    for ids in data:
        ids[:, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
    with torch.no_grad():  # what no static range fits
        model.get_input_embeddings().weight[1] *= 20
    calibration = sq_cpu.calibrate(model, data, rows=32, prefix=prefix)
    plan = far(model, calibration)
    learned = learn(model, calibration, plan, data, scheme=scheme, steps=1)
    assert sq_cpu.prefix_of(model) is None
    if scheme == MINMAX:  # learned without rows of own scales
        scheme = replace(scheme, dynamic_fallback=False)
    with torch.no_grad():
        expected = model(data[0]).logits[:, len(prefix) :].log_softmax(-1)
        quantized = copy.deepcopy(model)
        sq_cpu.quantize(quantized, calibration, plan, scheme=scheme)
        made = quantized(data[0]).logits[:, len(prefix) :].log_softmax(-1)
    wanted = (expected.exp() * (expected - made)).sum(-1).mean()
    # A code that falls to the other side of a tie, now and then.
    assert learned.before == pytest.approx(float(wanted), rel=0.02)


def test_bad_input_is_refused() -> None:
    model, data = planted("llama"), batches(2)
    calibration = sq_cpu.calibrate(model, data, rows=32)
    plan = far(model, calibration)
    with pytest.raises(SqCpuError, match="two batches"):
        learn(model, calibration, plan, data[:1], scheme="O3")
    with pytest.raises(SqCpuError, match="steps"):
        learn(model, calibration, plan, data, scheme="O3", steps=0)
    with pytest.raises(SqCpuError, match="steps is 20000; it is at most 10000"):
        learn(model, calibration, plan, data, scheme="O3", steps=20000)
    strange = replace(plan, groups=(replace(plan.groups[0], name="nobody"),))
    with pytest.raises(SqCpuError, match="no smoothing group nobody"):
        learn(model, calibration, strange, data, scheme="O3")

    class Silent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.inner(ids).logits

    silent = Silent()
    calibration = sq_cpu.calibrate(silent, data, rows=32)
    with pytest.raises(SqCpuError, match="no gradient"):
        learn(silent, calibration, far(silent, calibration), data, scheme="O3")
