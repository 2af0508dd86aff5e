"""Hooks see and change calls, and are gone afterwards, whatever happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sq_cpu
from sq_cpu.models.hooks import hooked, watching_inputs


def hooks_of(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor, *, plus: float = 0.0) -> torch.Tensor:
        return 2 * x + plus


def test_hooks_see_and_change_what_goes_in_and_out() -> None:
    module, x = Doubling(), torch.ones(3)

    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        return (args[0] + 1,), {"plus": kwargs["plus"] * 10}

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        assert kwargs == {"plus": 5.0}
        return output + args[0]

    with hooked(before=[(module, before)], after=[(module, after)]):
        assert module(x, plus=0.5).tolist() == [2 * 2 + 5 + 2] * 3
    assert module(x, plus=0.5).tolist() == [2.5] * 3


def test_watched_inputs_are_found_by_position_and_by_name() -> None:
    module, seen = Doubling(), []
    with watching_inputs({"a": module}, "x", lambda name, x: seen.append((name, float(x)))):
        module(torch.tensor(1.0))
        module(x=torch.tensor(2.0))
    module(torch.tensor(3.0))
    assert seen == [("a", 1.0), ("a", 2.0)]


def test_hooks_are_removed_after_an_error() -> None:
    module = Doubling()
    nothing: Any = lambda *_: None  # noqa: E731

    def interrupted() -> None:
        with hooked(before=[(module, nothing)]):
            assert hooks_of(module) == 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hooks_of(module) == 0

    def failing() -> Any:
        yield module, nothing
        raise ValueError("no hook")

    for half in ({"before": failing()}, {"after": failing()}):
        with pytest.raises(ValueError, match="no hook"), hooked(**half):
            pytest.fail("ran")
        assert hooks_of(module) == 0


def test_nothing_else_puts_hooks_on_modules() -> None:
    (folder,) = sq_cpu.__path__
    users = {
        path.relative_to(folder).as_posix()
        for path in Path(folder).rglob("*.py")
        if ".register_forward_" in path.read_text(encoding="utf-8")
    }
    assert users == {"models/hooks.py"}
