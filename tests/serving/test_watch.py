"""Rows that do not fit static scales, as a server counts and tells them."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_model, byte_tokenizer
from servers import NAME, serving
from tiny import batches

import sq_cpu
from sq_cpu import SmoothPlan
from sq_cpu.serving.watch import WINDOW, Watch

DOWN = "model.layers.1.mlp.down_proj"


def static_model(clip: float = 1.0) -> Any:
    """A model whose record says that all calibrated rows fitted; with a small clip few do."""
    model = byte_model()
    calibration = sq_cpu.calibrate(model, batches())
    plan = SmoothPlan.uniform(model, calibration, hadamard=0)
    plan = replace(plan, groups=tuple(replace(group, clip=clip) for group in plan.groups))
    sq_cpu.quantize(model, calibration, plan, scheme="O3")
    record = model.sq_cpu_config
    model.sq_cpu_config = replace(record, misfits=dict.fromkeys(record.layers, 0.0))
    return model


def rows(model: Any, count: int, value: float) -> None:
    layer = model.get_submodule(DOWN)
    with torch.no_grad():
        layer(torch.full((count, layer.in_features), value))


def fitting(model: Any) -> float:
    """The greatest value that a symmetric scale covers."""
    return float(model.get_submodule(DOWN).input_scale) * 127


def test_layers_are_judged_by_their_last_window_and_told_once() -> None:
    model, said = static_model(), list[str]()
    rows(model, 5000, 1e6)  # before the watch begins
    watch = Watch(model, said.append)
    watch.look()
    assert watch.layers[DOWN].rows == 0
    rows(model, WINDOW - 1, 1e6)
    watch.look()
    assert (watch.drifting, said) == ({}, [])
    rows(model, 1, 1e6)
    watch.look()
    assert {name: each.rows for name, each in watch.drifting.items()} == {DOWN: WINDOW}
    layers = len(model.sq_cpu_config.layers)
    assert said == [
        f"warning: in 1 of {layers} layers over 4 times as many rows as in calibration do not fit "
        f"the static scale ({DOWN}: 100.0%, then 0.0%); calibrate on text of this kind and "
        "quantize again"
    ]
    rows(model, WINDOW, fitting(model))
    watch.look()
    assert watch.drifting == {}
    assert watch.layers[DOWN].rows == 2 * WINDOW
    rows(model, WINDOW, 1e6)  # of all rows since the start, as many as before
    watch.look()
    assert [*watch.drifting] == [DOWN]
    assert len(said) == 1


def test_a_glance_is_a_look_at_most_once_a_second() -> None:
    model, now = static_model(), [0.0]
    watch = Watch(model, lambda _: None, lambda: now[0])
    seen = []
    for now[0] in (0.0, 0.9, 1.0, 1.5, 2.5):
        rows(model, 1, 1.0)
        watch.glance()
        seen.append(watch.layers[DOWN].rows)
    assert seen == [1, 1, 3, 3, 5]


@pytest.fixture(scope="module")
def clipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watch") / "int8"
    return sq_cpu.save(static_model(0.1), folder, byte_tokenizer())


def test_a_server_exports_the_counts_and_warns_once(clipped: Path) -> None:
    with serving(clipped) as served:
        body = {"model": NAME, "max_tokens": 1}
        served.post("/v1/completions", body | {"prompt": [[5, 6, 7]]}).raise_for_status()
        assert served.metric("sq_cpu:rows_total", layer=DOWN) == 3
        assert served.metric("sq_cpu:drifting_layers", model_name=NAME) == 0
        # No two begin alike: pages of what was read before are not read again.
        prompts = [[3 + i, *range(3, 252)] for i in range(17)]
        deadline = time.monotonic() + 30
        while not served.said:  # told though nobody reads the metrics
            assert time.monotonic() < deadline
            served.post("/v1/completions", body | {"prompt": prompts}).raise_for_status()
        assert served.metric("sq_cpu:rows_total", layer=DOWN) >= 3 + 17 * 250
        misfits = served.metric("sq_cpu:misfit_rows_total", layer=DOWN)
        assert 0 < misfits <= served.metric("sq_cpu:rows_total", layer=DOWN)
        assert served.metric("sq_cpu:calibrated_misfit_share", layer=DOWN) == 0
        assert served.metric("sq_cpu:drifting_layers") >= 1
        assert served.stop() == 0
        assert [line[:12] for line in served.said if "shutting" not in line] == ["warning: in "]


def test_a_model_without_static_layers_has_no_such_metrics(server: Any) -> None:
    text = server.get("/metrics").text
    assert "vllm:num_requests_running" in text
    assert "sq_cpu:" not in text
