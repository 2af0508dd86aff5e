"""Alpha per group: the least output error, found from one calibration."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import batches, tiny_model
from tuning_cases import logit_error, planted

import sq_cpu
from sq_cpu import Scheme, SmoothPlan, SqCpuError
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.smoothing.rules import smoothing_scale
from sq_cpu.smoothing.scales import as_planned, group_statistics
from sq_cpu.smoothing.smooth import fold
from sq_cpu.tuning.learned import learn
from sq_cpu.tuning.losses import LOSSES


@pytest.mark.parametrize("scheme", ["O1", "O2", "O3"])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_tuned_beats_no_smoothing_where_there_are_outliers(model_type: str, scheme: str) -> None:
    model = planted(model_type)
    calibration = sq_cpu.calibrate(model, batches(3))
    plan = sq_cpu.tune(model, calibration, scheme=scheme)
    assert {group.name for group in plan.groups} == {
        g.name for g in smoothing_groups(model) if g.consumers != ("lm_head",)
    }
    tuned = logit_error(model_type, plan, calibration, None)
    assert tuned < 0.5 * logit_error(model_type, None, calibration, scheme)


def test_the_chosen_alpha_has_the_least_error_of_its_grid() -> None:
    model = planted("llama")
    calibration = sq_cpu.calibrate(model, batches(3))

    def loss(plan: SmoothPlan) -> dict[str, float]:
        return {g.name: float(g.note.rpartition(" ")[2]) for g in plan.groups}

    best = loss(sq_cpu.tune(model, calibration, alphas=(0.1, 0.9, 0.4), clip=False))
    alone = [
        loss(sq_cpu.tune(model, calibration, alphas=(alpha, alpha, 1), clip=False))
        for alpha in (0.1, 0.5, 0.9)
    ]
    for name, value in best.items():
        assert value <= min(one[name] for one in alone)
    assert len({g.alpha for g in sq_cpu.tune(model, calibration).groups}) > 1


def test_tuning_changes_nothing_and_is_deterministic() -> None:
    model = planted("opt")
    before = {name: p.clone() for name, p in model.named_parameters()}
    plans = [sq_cpu.tune(model, sq_cpu.calibrate(model, batches(3))) for _ in range(2)]
    assert plans[0] == plans[1]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    fold(model, plans[0], sq_cpu.calibrate(model, batches(3)))  # and it can be folded


def test_only_what_is_quantized_is_scored() -> None:
    model = planted("llama")
    calibration = sq_cpu.calibrate(model, batches(3))
    scheme = Scheme.of("O3", ignore=("lm_head", "down_proj", "q_proj", "k_proj"))
    plan = sq_cpu.tune(model, calibration, scheme=scheme)
    assert {group.name.rpartition(".")[2] for group in plan.groups} == {
        "input_layernorm",
        "v_proj",
        "post_attention_layernorm",
    }
    alone = sq_cpu.calibrate(model, batches(3), ignore=scheme.ignore)
    assert plan == sq_cpu.tune(model, alone, scheme=scheme)


@pytest.mark.parametrize("kind", ["percentile", "mse"])
def test_alpha_is_scored_with_the_range_of_the_scheme(kind: Any) -> None:
    model = planted("llama")
    calibration = sq_cpu.calibrate(model, batches(3))
    # Seven bits per tensor and a long tail: the clip decides.
    minmax = Scheme.of("O3", reduce_range=True)
    clipped = Scheme.of("O3", reduce_range=True, static_range=kind)
    plans = [
        sq_cpu.tune(model, calibration, scheme=s, alphas=(0.2, 0.2, 1)) for s in (minmax, clipped)
    ]
    assert plans[0] != plans[1]


def test_weights_that_changed_are_refused() -> None:
    model = planted("llama")
    calibration = sq_cpu.calibrate(model, batches(3))
    fold(model, SmoothPlan.uniform(model, calibration), calibration)
    with pytest.raises(SqCpuError, match="changed since the calibration: calibrate again"):
        sq_cpu.tune(model, calibration)


def test_bad_input() -> None:
    model = tiny_model("llama")
    with pytest.raises(SqCpuError, match="no sampled rows: calibrate with rows=64"):
        sq_cpu.tune(model, sq_cpu.calibrate(model, batches(), rows=0))
    calibration = sq_cpu.calibrate(model, batches())
    for alphas in ((), (0.5,), (0.0, 2.0, 0.1), (0.5, 0.1, 0.1), (0.0, 1.0, 0.0), "all"):
        with pytest.raises(SqCpuError, match="alphas="):
            sq_cpu.tune(model, calibration, alphas=alphas)  # type: ignore[arg-type]
    with pytest.raises(SqCpuError, match="unknown loss 'l2'"):
        sq_cpu.tune(model, calibration, loss="l2")
    with pytest.raises(SqCpuError, match=r"no gradients of .*: calibrate with gradient_rows"):
        sq_cpu.tune(model, calibration, loss="kl")
    with pytest.raises(SqCpuError, match="criterion is 'median'"):
        sq_cpu.tune(model, calibration, criterion="median")  # type: ignore[arg-type]
    with pytest.raises(SqCpuError, match="unknown scheme 'O9'"):
        sq_cpu.tune(model, calibration, scheme="O9")


@pytest.mark.parametrize("loss", [*LOSSES])
def test_every_loss_finds_what_the_outliers_need(loss: str) -> None:
    model = planted("opt")
    calibration = sq_cpu.calibrate(model, batches(4), gradient_rows=64 * (loss == "kl"))
    plan = sq_cpu.tune(model, calibration, loss=loss)
    tuned = logit_error("opt", plan, calibration, None)
    assert tuned < 0.5 * logit_error("opt", None, calibration, "O3")
    assert all(f"{loss} " in group.note and len(group.curve) > 21 for group in plan.groups)


def test_gradients_decide_the_default_loss() -> None:
    model = planted("opt")
    without = sq_cpu.tune(model, sq_cpu.calibrate(model, batches(4)))
    calibration = sq_cpu.calibrate(model, batches(4), gradient_rows=64)
    assert sq_cpu.tune(model, calibration) == sq_cpu.tune(model, calibration, loss="kl")
    assert sq_cpu.tune(model, calibration, loss="nmse") == without


def test_criterion_takes_the_least_or_greatest_of_the_members_alphas() -> None:
    model = planted("llama")
    calibration = sq_cpu.calibrate(model, batches(4))
    least, mean, greatest = (
        {g.name: g.alpha for g in sq_cpu.tune(model, calibration, criterion=c).groups}
        for c in ("min", "mean", "max")
    )
    assert all(least[name] <= greatest[name] for name in mean)
    assert any(least[name] < greatest[name] for name in mean if "norm" in name)
    # Clips are searched for the mean; then the whole grid is looked at.
    minmax = Scheme.of("O3", static_range="minmax")
    clipped = [
        sq_cpu.tune(model, calibration, scheme=minmax, criterion=c).groups for c in ("min", "max")
    ]
    assert all(a.alpha <= b.alpha and a.clip == b.clip for a, b in zip(*clipped, strict=True))
    # One linear alone has one optimum.
    alone = [name for name in mean if name.endswith(("v_proj", "up_proj"))]
    assert alone
    assert all(least[name] == mean[name] == greatest[name] for name in alone)


def test_block_wise_the_groups_of_a_block_share_alpha_and_clip() -> None:
    model = planted("llama")
    calibration = sq_cpu.calibrate(model, batches(4))
    scheme = Scheme.of("O3", static_range="minmax")
    plan = sq_cpu.tune(model, calibration, scheme=scheme, block_wise=True)
    blocks: dict[str, set[tuple[float, float]]] = {}
    for group in plan.groups:
        block = ".".join(group.name.split(".")[:3])
        blocks.setdefault(block, set()).add((group.alpha, group.clip))
    assert len(blocks) == model.config.num_hidden_layers
    assert all(len(shared) == 1 for shared in blocks.values())
    assert len(set.union(*blocks.values())) > 1


def test_clip_is_searched_for_static_scales_alone_that_hold_for_all_rows() -> None:
    model = planted("llama")
    calibration = sq_cpu.calibrate(model, batches(4))
    plan = sq_cpu.tune(model, calibration, scheme=Scheme.of("O3", static_range="minmax"))
    assert any(group.clip != 1 for group in plan.groups)
    assert plan.scheme == Scheme.of("O3", static_range="minmax")
    assert sq_cpu.quantize(planted("llama"), calibration, plan).sq_cpu_config.scheme == plan.scheme
    for refusing in (sq_cpu.quantize, sq_cpu.analyze):
        with pytest.raises(SqCpuError, match=r"clips are of static_range='minmax', and the scheme"):
            refusing(planted("llama"), calibration, plan, scheme=Scheme.of("O3"))
        refusing(planted("llama"), calibration, plan, scheme="O1")
    with pytest.raises(SqCpuError, match=r"has 'auto': give none,"):
        learn(model, calibration, plan, batches(2), scheme=Scheme.of("O3"))
    # By name, the plan says which range O3 has.
    named = sq_cpu.quantize(planted("llama"), calibration, plan, scheme="O3").sq_cpu_config
    assert named.scheme == plan.scheme
    without = sq_cpu.tune(model, calibration, scheme=plan.scheme, clip=False)
    assert all(group.clip == 1 for group in without.groups)
    # A range that most rows fit follows alpha.
    for scheme in ("O1", "O2", "O3"):
        plan = sq_cpu.tune(model, calibration, scheme=scheme)
        assert all(group.clip == 1 for group in plan.groups)
        assert plan.scheme == Scheme.of(scheme)


def test_scored_are_rows_that_did_not_make_the_range() -> None:
    # Fold by fold another channel has the outlier: at alpha 1 on the rows that made the range
    # nothing clips, and held out the outlier of the fold does.
    class One(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = One().eval()
    inputs = [torch.randn(64, 16) for _ in range(4)]
    for channel, x in enumerate(inputs):
        x[::8, channel] *= 30
    calibration = sq_cpu.calibrate(model, inputs, ignore=(), rows=256)
    folds = calibration.held_out(["linear"])
    assert len(folds) == 4
    for held_out, x in zip(folds, inputs, strict=True):
        others = torch.cat([other for other in inputs if other is not x])
        assert torch.equal(held_out.channel_max["linear"], others.amax(dim=0))
        assert torch.equal(held_out.channel_min["linear"], others.amin(dim=0))
        rows = held_out.rows["linear"]
        assert torch.equal(rows[rows[:, 0].argsort()], x[x[:, 0].argsort()])
    seen = replace(calibration, row_folds={}, fold_min={}, fold_max={})
    scheme = Scheme.of("O3", ignore=(), dynamic_fallback=False)
    unseen_loss, seen_loss = (
        float(sq_cpu.tune(model, c, scheme=scheme, clip=False).groups[0].note.split()[-1])
        for c in (calibration, seen)
    )
    assert unseen_loss > 10 * seen_loss


def test_one_batch_is_scored_on_itself() -> None:
    model = planted("llama")
    calibration = sq_cpu.calibrate(model, batches(1))
    name = next(iter(calibration.rows))
    assert calibration.held_out([name]) == (calibration,)
    assert sq_cpu.tune(model, calibration).groups


def test_rows_that_clip_are_not_free() -> None:
    """A row that clips gets its own scale, at no error but some time: a search must not use it."""
    model, data = planted("llama"), batches(4)
    calibration = sq_cpu.calibrate(model, data, rows=64, gradient_rows=64)
    scheme = Scheme.of("O3", static_range="minmax")
    plans = [
        sq_cpu.tune(model, calibration, scheme=replace(scheme, dynamic_fallback=fallback))
        for fallback in (True, False)
    ]
    assert plans[0].groups == plans[1].groups
    quantized = sq_cpu.quantize(copy.deepcopy(model), calibration, plans[0])
    with torch.no_grad():
        for ids in data:
            quantized(ids)
    counts = sq_cpu.row_counts(quantized).values()
    assert sum(each.clipped for each in counts) < 0.2 * sum(each.rows for each in counts)


@pytest.mark.parametrize("fallback", [True, False])
@pytest.mark.parametrize("kind", ["auto", "minmax"])
def test_what_is_scored_is_what_quantize_carries_out(kind: Any, fallback: bool) -> None:
    model = planted("llama")
    with torch.no_grad():  # a row in 20 that most rows' range leaves out
        model.get_input_embeddings().weight[:3] *= 20
    calibration = sq_cpu.calibrate(model, batches(1))  # one batch: nothing is held out
    given: dict[str, Any] = {"loss": "nmse", "alphas": (0.4, 0.4, 1), "outliers": 0, "hadamard": 0}
    scheme = Scheme.of("O3", static_range=kind, dynamic_fallback=fallback).resolve(True)
    plan = sq_cpu.tune(model, calibration, scheme=scheme, **given)
    assert plan.scheme == scheme
    fits = kind == "auto" and fallback
    assert any(group.clip != 1 for group in plan.groups) is not fits
    scheme = replace(scheme, dynamic_fallback=fits)  # a search must not count on own scales
    named = {group.name: group for group in smoothing_groups(model)}
    for planned in plan.groups:
        statistics = group_statistics(model, named[planned.name], calibration, scheme)
        s = smoothing_scale(planned.rule, statistics, planned.alpha)
        fakes = as_planned(statistics, planned).fake_quantized(s)
        wanted = sum(float(x.squared_error() / x.sample.squared_output()) for x in fakes)
        assert float(planned.note.split()[-1]) == pytest.approx(wanted, rel=0.01)
