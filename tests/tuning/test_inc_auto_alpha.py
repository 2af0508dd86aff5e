"""Neural Compressor's search, the baseline."""

from dataclasses import replace

import pytest
import torch
from tiny import batches, tiny_model
from tuning_cases import logit_error, planted

import sq_cpu
from sq_cpu import Scheme, SmoothPlan, SqCpuError
from sq_cpu.smoothing.plan import Hadamard


def test_inc_chooses_alphas_from_quantized_runs() -> None:
    model = planted("llama")
    data = batches(4)
    calibration = sq_cpu.calibrate(model, data)
    before = {name: p.clone() for name, p in model.named_parameters()}
    grid = (0.0, 1.0, 0.1)
    plans = [
        sq_cpu.tune(model, calibration, method="inc", batches=data, alphas=grid) for _ in range(2)
    ]
    assert plans[0] == plans[1]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(len(group.curve) == 11 for group in plans[0].groups)
    assert logit_error("llama", plans[0], calibration, "O3") < 0.5 * logit_error(
        "llama", None, calibration, "O3"
    )
    with pytest.raises(SqCpuError, match="pass batches"):
        sq_cpu.tune(model, calibration, method="inc")
    with pytest.raises(SqCpuError, match="method is 'best'"):
        sq_cpu.tune(model, calibration, method="best")  # type: ignore[arg-type]


def test_inc_refuses_a_prefix() -> None:
    model, data = planted("llama"), batches(2)
    prefix = data[0][0, :1].tolist()
    calibration = sq_cpu.calibrate(model, data, prefix=prefix)
    with pytest.raises(SqCpuError, match=r'"inc" knows no prefix, .*: calibrate without prefix'):
        sq_cpu.tune(model, calibration, method="inc", batches=data)


def test_inc_by_its_definition() -> None:
    # One linear and one sample: the alpha of least sum(|y - y~| / rowmax|y|)^0.5.
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 16))
    x = torch.randn(24, 32)
    x[:, 5] *= 40
    calibration = sq_cpu.calibrate(model, [x], ignore=())
    scheme = Scheme.of("O3", ignore=())
    (group,) = sq_cpu.tune(model, calibration, scheme=scheme, method="inc", batches=[x]).groups
    with torch.no_grad():
        y = model(x) - model[0].bias
    losses = {}
    for step in range(21):
        alpha = step / 20
        made = torch.nn.Sequential(torch.nn.Linear(32, 16))
        made.load_state_dict(model.state_dict())
        plan = SmoothPlan((replace(group, alpha=alpha, curve=()),))
        sq_cpu.quantize(made, calibration, plan, scheme=scheme)
        with torch.no_grad():
            off = (made(x) - model[0].bias - y).abs()
        losses[alpha] = float((off / y.abs().amax(dim=1, keepdim=True)).sqrt().sum())
    assert group.alpha == min(losses, key=losses.__getitem__)
    for alpha, loss in group.curve:
        assert loss == pytest.approx(losses[alpha], rel=1e-3)


def test_inc_where_other_tokens_reach_an_expert() -> None:
    model = tiny_model("mixtral")
    data = batches(4)
    calibration = sq_cpu.calibrate(model, data)
    plan = sq_cpu.tune(model, calibration, method="inc", batches=data, alphas=(0.0, 1.0, 0.5))
    assert {group.alpha for group in plan.groups} <= {0.0, 0.5, 1.0}


def test_inc_rotates_what_it_is_told_to_and_nothing_else() -> None:
    model, data = tiny_model("llama", head_dim=64), batches(2)
    calibration = sq_cpu.calibrate(model, data)
    cases: list[tuple[Hadamard, set[int]]] = [("auto", set()), (64, {64})]
    for hadamard, expected in cases:
        plan = sq_cpu.tune(
            model,
            calibration,
            method="inc",
            batches=data,
            alphas=(0.5, 0.5, 0.1),
            hadamard=hadamard,
        )
        assert {group.hadamard for group in plan.groups} - {0} == expected
        assert not any(group.hadamard_fold for group in plan.groups)
