"""Rows as the quantized part of a model makes them, and alphas tuned on them."""

from dataclasses import replace

import pytest
import torch
from tiny import batches, inputs, tiny_model
from tuning_cases import planted

import sq_cpu
from sq_cpu import Scheme, SqCpuError
from sq_cpu.calibration.sampling import SampledRows
from sq_cpu.models.calls import evaluating
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.models.hooks import watching_inputs
from sq_cpu.models.linears import linearized, quantizable_linears
from sq_cpu.models.padding import padding_of
from sq_cpu.smoothing.plan import uniform_plan
from sq_cpu.tuning.sequential import QuantizedPrefix

SCHEME = Scheme.of("O3").resolve(True)


@pytest.mark.parametrize("model_type", ["llama", "opt", "mixtral"])
def test_the_same_run_gives_the_same_rows(model_type: str) -> None:
    model, data = tiny_model(model_type), batches(5)
    mask = torch.ones_like(data[0])
    mask[1, 10:] = 0
    data[0] = {"input_ids": data[0].where(mask > 0, 0), "attention_mask": mask}
    calibration = sq_cpu.calibrate(model, data, rows=12, gradient_rows=12)
    with linearized(model):
        linears = quantizable_linears(model, ("lm_head",))
        sampled = SampledRows(calibration, 5 * 2 * 16 - 6)
        with evaluating(model), watching_inputs(linears, "input", sampled.observe):
            for batch in data:
                mapping = batch if isinstance(batch, dict) else {"input_ids": batch}
                with sampled.batch(padding_of(model, (), mapping)):
                    model(**mapping)
    again = sampled.calibration()
    for name in calibration.rows:
        torch.testing.assert_close(again.rows[name], calibration.rows[name])
        torch.testing.assert_close(again.gradient_rows[name], calibration.gradient_rows[name])


def led(prefix: tuple[int, ...]) -> list[torch.Tensor]:
    """Return five batches of texts that begin with a prefix, but for one text."""
    data = batches(5)
    for number, ids in enumerate(data):
        ids[number == 3 :, : len(prefix)] = torch.tensor(prefix, dtype=torch.int64)
    return data


def every_row(model: torch.nn.Module, prefix: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Return the inputs of all linears over the batches, in their order, without a prefix's."""
    seen: dict[str, list[torch.Tensor]] = {}

    def see(name: str, x: torch.Tensor) -> None:
        x = x.reshape(*ids.shape, -1)
        for text, rows in zip(ids.tolist(), x, strict=True):
            leads = tuple(text[: len(prefix)]) == prefix
            seen.setdefault(name, []).append(rows[len(prefix) if leads else 0 :])

    linears = {n: m for n, m in model.named_modules() if hasattr(m, "in_features")}
    del linears["lm_head"]
    with evaluating(model), watching_inputs(linears, "input", see):
        for ids in led(prefix):
            model(ids)
    return {name: torch.cat(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("prefix", [(), (1, 5)])
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_rows_are_those_behind_a_quantized_first_block(
    model_type: str, prefix: tuple[int, ...]
) -> None:
    model, data = planted(model_type), led(prefix)
    calibration = sq_cpu.calibrate(model, data, rows=12, gradient_rows=12, prefix=prefix)
    groups = {group.name: group for group in smoothing_groups(model)}
    plan = uniform_plan(model, groups.values(), calibration, ignore=SCHEME.ignore, hadamard=0)
    tuned = {group.name: replace(group, fold=False, clip=0.8) for group in plan.groups}
    fed = dict(QuantizedPrefix(model, calibration, data, groups, SCHEME).blocks(tuned, {}))
    blocks = [name.removesuffix(".self_attn.q_proj") for name in calibration.channel_min]
    first, second_block = dict.fromkeys(n for n in blocks if n.rpartition(".")[2].isdecimal())
    assert list(fed) == [first, second_block]

    # The real thing: the first block in int8 kernels.
    second = [name for name in calibration.channel_min if name.startswith(f"{second_block}.")]
    of_first = [g for g in tuned.values() if groups[g.name].block == first]
    quantized = sq_cpu.quantize(
        planted(model_type),
        calibration,
        replace(plan, groups=tuple(of_first)),
        scheme=Scheme.of("O3", ignore=("lm_head", *second)),
    )
    rows, before = every_row(quantized, prefix), every_row(model, prefix)
    for name in calibration.rows:
        seen = fed[second_block if name in second else first]
        for places, of_kind in (
            (calibration.row_places, seen.rows),
            (calibration.gradient_places, seen.gradient_rows),
        ):
            if name in second:
                expected = rows[name][places[name]]
                torch.testing.assert_close(of_kind[name], expected, rtol=1e-4, atol=1e-5)
                assert not torch.equal(of_kind[name], before[name][places[name]])
            else:
                torch.testing.assert_close(of_kind[name], before[name][places[name]])
        assert torch.equal(seen.channel_max[name], calibration.channel_max[name])


@pytest.mark.parametrize("model_type", ["llama", "opt", "mixtral", "gemma3_text"])
@pytest.mark.parametrize("gradient_rows", [0, 16])
def test_later_blocks_are_tuned_on_other_rows(model_type: str, gradient_rows: int) -> None:
    model, data = planted(model_type), batches(4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    calibration = sq_cpu.calibrate(model, data, gradient_rows=gradient_rows)
    alone = sq_cpu.tune(model, calibration)
    plans = [sq_cpu.tune(model, calibration, sequential=True, batches=data) for _ in range(2)]
    assert plans[0] == plans[1]
    assert [g.name for g in plans[0].groups] == [g.name for g in alone.groups]
    same = [a == b for a, b in zip(alone.groups, plans[0].groups, strict=True)]
    first = {g.name for g in smoothing_groups(model) if ".0." in g.consumers[0]}
    for group, equal in zip(alone.groups, same, strict=True):
        assert equal or group.name not in first
    assert not all(same)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "forward" not in {key for m in model.modules() for key in vars(m)}


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_padding(model_type: str) -> None:
    """Experts see the padding, too, and are scored on the float model's rows."""
    model, data = planted(model_type), batches(4)
    mask = torch.ones_like(data[0])
    mask[:, 10:] = 0
    padded = [{"input_ids": ids, "attention_mask": mask} for ids in data]
    calibration = sq_cpu.calibrate(model, padded)
    with linearized(model):
        groups = {group.name: group for group in smoothing_groups(model)}
        plan = uniform_plan(model, groups.values(), calibration, ignore=SCHEME.ignore, hadamard=0)
        tuned = {group.name: replace(group, clip=0.7) for group in plan.groups}
        prefix = QuantizedPrefix(model, calibration, iter(padded), groups, SCHEME)
        _, (_, seen) = prefix.blocks(tuned, {})
    for name, rows in seen.rows.items():
        if ".1." in name:
            assert torch.equal(rows, calibration.rows[name]) == ("experts" in name)


def test_a_family_that_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = planted("llama"), batches(4)
    model.config.model_type = "something"
    calibration = sq_cpu.calibrate(model, data)
    alone = sq_cpu.tune(model, calibration)
    fed = sq_cpu.tune(model, calibration, sequential=True, batches=data)
    assert [g.name for g in fed.groups] == [g.name for g in alone.groups]
    assert fed != alone


def test_what_sequential_tuning_refuses() -> None:
    model, data = tiny_model("llama"), batches(4)
    calibration = sq_cpu.calibrate(model, data)
    with pytest.raises(SqCpuError, match="sequential=True runs the model: pass batches"):
        sq_cpu.tune(model, calibration, sequential=True)
    with pytest.raises(SqCpuError, match="tuning got no batches"):
        sq_cpu.tune(model, calibration, sequential=True, batches=[])
    message = r"these 2 batches have 64 tokens, and are not the 4 that were calibrated on"
    with pytest.raises(SqCpuError, match=message):
        sq_cpu.tune(model, calibration, sequential=True, batches=data[:2])
    with pytest.raises(SqCpuError, match="have 120 tokens, and are not the 4"):
        sq_cpu.tune(model, calibration, sequential=True, batches=[*data[:3], data[3][:, :12]])
    with pytest.raises(SqCpuError, match="drop sequential"):
        sq_cpu.tune(model, calibration, sequential=True, batches=data, method="inc")
    old = replace(calibration, rows_seen={})
    with pytest.raises(SqCpuError, match="of an earlier version"):
        sq_cpu.tune(model, old, sequential=True, batches=data)
    whisper = tiny_model("whisper")
    ids = inputs("whisper", 2)
    with pytest.raises(SqCpuError, match=r"2 stacks of blocks; tune it with sequential=False"):
        sq_cpu.tune(whisper, sq_cpu.calibrate(whisper, ids), sequential=True, batches=ids)


def test_a_prefix_behind_experts_is_the_float_models() -> None:
    model, data = planted("mixtral"), led((1, 5))[:3]
    calibration = sq_cpu.calibrate(model, data, prefix=[1, 5])
    with torch.no_grad():
        wanted = [model(ids, output_hidden_states=True).hidden_states[1] for ids in data]
    with linearized(model):
        groups = {group.name: group for group in smoothing_groups(model)}
        plan = uniform_plan(model, groups.values(), calibration, ignore=SCHEME.ignore, hadamard=0)
        tuned = {group.name: replace(group, clip=0.7) for group in plan.groups}
        blocks = QuantizedPrefix(model, calibration, data, groups, SCHEME).blocks(tuned, {})
        next(blocks)
        seen: list[torch.Tensor] = []
        norm = {"": model.model.layers[1].input_layernorm}
        with watching_inputs(norm, "input", lambda _, x: seen.append(x)):
            next(blocks)
    for made, states in zip(seen, wanted, strict=True):
        torch.testing.assert_close(made[:, :2], states[:, :2])
        assert not torch.allclose(made[:, 2:], states[:, 2:], atol=1e-3)


def test_a_prefix_is_not_among_the_rows() -> None:
    model = planted("llama")
    data = batches(5)
    for ids in data:
        ids[:, :2] = torch.tensor([1, 5])
    calibration = sq_cpu.calibrate(model, data, rows=500, prefix=[1, 5])
    groups = {group.name: group for group in smoothing_groups(model)}
    with linearized(model):
        blocks = QuantizedPrefix(model, calibration, data, groups, SCHEME).blocks({}, {})
        _, first = next(blocks)
    assert {len(rows) for rows in first.rows.values()} == {5 * 2 * 14}
    for name, rows in first.rows.items():
        torch.testing.assert_close(rows, calibration.rows[name])
    tuned = sq_cpu.tune(model, calibration, scheme="O3", sequential=True, batches=data)
    assert tuned.groups
