"""The whole path on a real model, SmolLM2-135M-Instruct: it has real activation outliers.

Protocol: 16 calibration and 20 evaluation windows of 512 tokens from the shipped texts.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sameness import digests, logits_of_a_fresh_process
from torch import Tensor, nn
from tuning_cases import costs

import sq_cpu
from sq_cpu import Calibration, QuantLinear, Scheme, SmoothPlan, texts
from sq_cpu.evaluation.perplexity import token_windows
from sq_cpu.models.linears import quantizable_linears
from sq_cpu.smoothing.smooth import fold

pytestmark = pytest.mark.slow

FP32 = 32.72


@pytest.fixture(scope="module")
def loaded(smollm2: Callable[[], tuple[nn.Module, Any]]) -> tuple[nn.Module, Any]:
    return smollm2()


@pytest.fixture(scope="module")
def calibration(loaded: tuple[nn.Module, Any]) -> Calibration:
    model, tokenizer = loaded
    windows = token_windows(tokenizer, texts.calibration(), window=512, windows=16)
    return sq_cpu.calibrate(model, windows)


@pytest.fixture(scope="module")
def quantized(
    loaded: tuple[nn.Module, Any], calibration: Calibration
) -> Callable[[str, float | None], nn.Module]:
    """Quantize a copy: scheme, and alpha or None for naive. Each variant is made once."""
    made: dict[tuple[str, float | None], nn.Module] = {}

    def make(scheme: str, alpha: float | None) -> nn.Module:
        if (scheme, alpha) not in made:
            model = copy.deepcopy(loaded[0])
            # As the figures were made: no rotations, and no rows with their own scale.
            plain = Scheme.of(scheme, dynamic_fallback=False)
            plan = None
            if alpha is not None:
                plan = SmoothPlan.uniform(model, calibration, alpha, hadamard=0)
            sq_cpu.quantize(model, calibration, plan, scheme=plain, smooth=alpha is not None)
            made[scheme, alpha] = model
        return made[scheme, alpha]

    return make


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits  # type: ignore[no-any-return]


def test_float_perplexity_is_the_published_one(loaded: tuple[nn.Module, Any]) -> None:
    perplexity = sq_cpu.perplexity(*loaded, texts.evaluation())
    assert perplexity == pytest.approx(FP32, abs=0.02)


@pytest.mark.parametrize(
    ("scheme", "alpha", "fake_quantized"),
    [("O3", 0.8, 34.27), ("O1", 0.8, 33.31), ("O1", None, 33.79)],
)
def test_int8_perplexity_equals_that_of_fake_quantization(
    loaded: tuple[nn.Module, Any],
    quantized: Callable[[str, float | None], nn.Module],
    scheme: str,
    alpha: float | None,
    fake_quantized: float,
) -> None:
    model = quantized(scheme, alpha)
    perplexity = sq_cpu.perplexity(model, loaded[1], texts.evaluation())
    assert perplexity == pytest.approx(fake_quantized, rel=0.005)


def test_naive_static_quantization_is_ruined_by_the_outliers(
    loaded: tuple[nn.Module, Any], quantized: Callable[[str, float | None], nn.Module]
) -> None:
    # No figure: rounding differences of 1e-7 move this perplexity by percents.
    perplexity = sq_cpu.perplexity(quantized("O3", None), loaded[1], texts.evaluation())
    assert perplexity > 2.4 * FP32


def test_folding_moves_logits_by_rounding_only(
    loaded: tuple[nn.Module, Any], calibration: Calibration
) -> None:
    model, tokenizer = loaded
    (ids,) = token_windows(tokenizer, texts.evaluation(), window=128, windows=1)
    folded = copy.deepcopy(model)
    fold(folded, SmoothPlan.uniform(folded, calibration, 0.8), calibration)
    before, after = logits(model, ids), logits(folded, ids)
    # 30 layers of fp32: each rounds to 2^-24, and this model's norms amplify a little.
    assert (after - before).norm() <= 1e-4 * before.norm()
    changed = dict(folded.named_parameters())["model.layers.0.mlp.down_proj.weight"]
    assert not torch.equal(
        changed, dict(model.named_parameters())["model.layers.0.mlp.down_proj.weight"]
    )


@pytest.mark.parametrize("scheme", ["O1", "O2", "O3"])
def test_kernels_give_the_logits_of_the_reference(
    loaded: tuple[nn.Module, Any],
    quantized: Callable[[str, float | None], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
) -> None:
    (ids,) = token_windows(loaded[1], texts.evaluation(), window=64, windows=1)
    model = quantized(scheme, 0.8)
    by_kernels = logits(model, ids)
    monkeypatch.setattr(QuantLinear, "forward", QuantLinear.reference)
    by_reference = logits(model, ids)
    assert (by_kernels - by_reference).abs().max() <= 1e-4 * by_reference.abs().max()


def test_int8_linears_take_at_most_27_percent(
    loaded: tuple[nn.Module, Any], quantized: Callable[[str, float | None], nn.Module]
) -> None:
    before = sum(m.weight.nbytes for m in quantizable_linears(loaded[0], ("lm_head",)).values())
    layers = [m for m in quantized("O3", 0.8).modules() if isinstance(m, QuantLinear)]
    resident = sum(t.nbytes for m in layers for t in (*m.buffers(), *m.parameters()))
    assert len(layers) == 210
    assert resident <= 0.27 * before


@pytest.mark.parametrize("scheme", ["O1", "O3"])
def test_saved_and_loaded_elsewhere_the_layers_are_identical(
    loaded: tuple[nn.Module, Any],
    quantized: Callable[[str, float | None], nn.Module],
    tmp_path: Path,
    scheme: str,
) -> None:
    (ids,) = token_windows(loaded[1], texts.evaluation(), window=128, windows=1)
    model = quantized(scheme, 0.8)
    sq_cpu.save(model, tmp_path / "int8", loaded[1])
    assert len(digests(model)) > 3 * 210
    found = logits_of_a_fresh_process({"int8": model}, ids, tmp_path)
    # Every weight and every int8 linear is equal bit for bit. torch's fp32 products between them
    # are so only where MKL promises it (not for other alignments and thread counts), and a
    # difference in the last bit may move an int8 code.
    before, after = logits(model, ids), found["int8"]
    assert (before - after).abs().max() <= 1e-3 * before.abs().max()


def test_the_fastest_scheme_that_holds_a_goal(loaded: tuple[nn.Module, Any]) -> None:
    model, tokenizer = loaded
    windows = token_windows(tokenizer, texts.calibration(), window=128, windows=4)
    calibration = sq_cpu.calibrate(model, windows)
    scored = sq_cpu.TextPerplexity(tokenizer, texts.selection(), 128, 4)

    def picked(goal: str, scheme: Scheme, **options: Any) -> sq_cpu.PickedScheme:
        # Measured, O1 is 5 % slower than O3: so much may be chance.
        given = options | {"schemes": ("O1", scheme), "costs": costs(model)}
        found = sq_cpu.pick_scheme(model, calibration, scored, goal, **given)
        times = [one.milliseconds for one in found.tried]
        assert times == sorted(times)
        assert found.milliseconds == times[-1]
        assert found.milliseconds < found.float_milliseconds
        return found

    found = picked("10%", Scheme.of("O3"))
    assert found.scheme.name == "O3"
    assert [one.holds for one in found.tried] == [True]  # O1 is slower, and not tried
    # The model is as it was, and quantized so is worth what was measured.
    *_, before = scored(model)
    quantized = sq_cpu.quantize(copy.deepcopy(model), calibration, scheme=found.scheme)
    *_, after = scored(quantized)
    assert (found.float_metric, found.metric) == (before, after)
    assert after <= 1.1 * before

    # Naive, of scales that all rows share: its outliers ruin O3, and not O1.
    ruined = Scheme.of("O3", static_range="minmax", dynamic_fallback=False)
    found = picked("30%", ruined, smooth=False)
    assert [one.scheme for one in found.tried] == [ruined, Scheme.of("O1")]
    assert [one.holds for one in found.tried] == [False, True]
    assert found.scheme == Scheme.of("O1")
    assert found.metric <= 1.3 * before < 1.5 * before < found.tried[0].metric
