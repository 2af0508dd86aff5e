"""Schemes, and layers of each."""

import itertools
from typing import get_args

import torch
from torch import nn

from sq_cpu import QuantLinear, Scheme
from sq_cpu.scheme import Activations

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


SCHEMES = [
    Scheme(activations=activations, symmetric=symmetric, reduce_range=reduce_range)
    for activations, symmetric, reduce_range in itertools.product(
        get_args(Activations), (True, False), (False, True)
    )
]


def describe(scheme: Scheme) -> str:
    kind = "sym" if scheme.symmetric else "asym"
    return f"{scheme.activations}-{kind}{'-7bit' if scheme.reduce_range else ''}"


def make(k: int, n: int, scheme: Scheme, *, bias: bool = True) -> QuantLinear:
    input_range = (-2.5, 3.0) if scheme.activations == "static" else None
    return QuantLinear.from_float(nn.Linear(k, n, bias=bias), scheme, input_range)
