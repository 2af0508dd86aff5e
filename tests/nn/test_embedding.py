"""QuantEmbedding: rows of a head's weight against the reference, and a module's ordinary life."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from quant_linears import DTYPES
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.nn.embedding import QuantEmbedding, is_lookup
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.scheme import Scheme


class Scaled(nn.Embedding):
    """As Gemma's: the scale is a buffer."""

    def __init__(self, *args: Any, scale: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("embed_scale", torch.tensor(scale), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Offset(nn.Embedding):
    """As OPT's positions."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 1)


class Tied(nn.Module):
    """A head, and the embedding that reads its weight."""

    def __init__(self, vocabulary: int, width: int, *, smoothed: bool, bias: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(width, vocabulary, bias=bias)
        smoothing = torch.rand(width) + 0.5 if smoothed else None
        scheme = Scheme(activations="per_token_x2")
        self.head = QuantLinear.from_float(self.linear, scheme, smoothing=smoothing)
        self.embedding = QuantEmbedding(self.head, nn.Embedding(vocabulary, width))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smoothed"])
def test_rows_equal_the_reference(each_isa: str, smoothed: bool) -> None:
    for vocabulary, width in ((1, 1), (17, 63), (64, 64), (33, 65), (101, 200)):
        tied = Tied(vocabulary, width, smoothed=smoothed, bias=True)
        for dtype in DTYPES:
            embedding = copy.deepcopy(tied.embedding).to(dtype)
            for shape in ((), (1,), (2, 3), (0, 4), (40, 5)):
                ids = torch.randint(0, vocabulary, shape)
                for given in (ids, ids.int()):
                    found = embedding(given)
                    assert found.dtype == dtype
                    assert found.shape == (*shape, width)
                    assert torch.equal(found, embedding.reference(given))


def test_rows_are_those_of_the_float_weight() -> None:
    tied = Tied(50, 96, smoothed=True)
    ids = torch.arange(50)
    # A step is absmax / 127 of the smoothed row, of which s is between 0.5 and 1.5.
    step = tied.head.weight_scale[:, None] / tied.head.smoothing
    assert ((tied.embedding(ids) - tied.linear.weight[ids]).abs() <= 0.5001 * step).all()


def test_logits_of_two_terms_are_nearly_those_of_float_activations() -> None:
    tied = Tied(300, 128, smoothed=True)
    x = torch.randn(40, 128)
    x[:, 3] *= 100  # the outlier channel that one term has no codes beside
    weight = tied.embedding(torch.arange(300))  # the int8 weight, divided by s
    exact = x.double() @ weight.double().T
    error = (tied.head(x) - exact).norm() / exact.norm()
    coarse = QuantLinear.from_float(tied.linear, Scheme(), smoothing=tied.head.smoothing)
    coarse.load_state_dict(tied.head.state_dict())
    # A step of the second term is 1 / 254 of one of the first.
    assert error < 3e-4
    assert (coarse(x) - exact).norm() / exact.norm() > 20 * error


@pytest.mark.parametrize("m", [*range(1, 41)])
def test_two_terms_equal_the_reference_at_every_number_of_rows(m: int) -> None:
    tied = Tied(101, 65, smoothed=True, bias=True)
    for dtype in DTYPES:
        x = torch.randn(m, 65)
        x[m // 2] = 0.0
        x[m // 3, 5] = (torch.nan, torch.inf, 1e-38)[m % 3]
        y = tied.head(x.to(dtype))
        assert torch.equal(y.nan_to_num(7.0), tied.head.reference(x.to(dtype)).nan_to_num(7.0))
        quantized = tied.head.quantize_input(x.to(dtype))
        assert torch.equal(tied.head(quantized).nan_to_num(7.0), y.nan_to_num(7.0))


@pytest.mark.parametrize("ids", [[-1], [50], [2**62]])
def test_ids_without_a_row_are_refused(ids: list[int]) -> None:
    with pytest.raises(SqCpuError, match=rf"^id {ids[0]} is none of the 50 rows of the weight$"):
        Tied(50, 8, smoothed=True).embedding(torch.tensor(ids))


def test_other_ids_are_refused() -> None:
    embedding = Tied(50, 8, smoothed=True).embedding
    for ids in (torch.zeros(2), torch.zeros(2, dtype=torch.uint8), torch.zeros(2).to_sparse()):
        with pytest.raises(SqCpuError, match="use int64 or int32, dense"):
            embedding(ids)
    with pytest.raises(SqCpuError, match="runs on the CPU only"):
        embedding(torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(SqCpuError, match=r"dtype is torch\.float64"):
        embedding.double()(torch.zeros(2, dtype=torch.int64))


def test_the_weight_is_held_once_wherever_the_model_goes() -> None:
    tied = Tied(50, 8, smoothed=True)
    ids = torch.arange(10)
    expected = tied(ids)
    for other in (copy.deepcopy(tied), pickle.loads(pickle.dumps(tied)), tied.share_memory()):
        assert other.embedding.head is other.head
        assert torch.equal(other(ids), expected)
    assert not tied.embedding.state_dict()
    assert [name for name, _ in tied.named_modules()] == ["", "linear", "head", "embedding"]
    state = Tied(50, 8, smoothed=True).head.state_dict()
    tied.head.load_state_dict(state)
    assert not torch.equal(tied(ids), expected)  # the lookup reads what the head has now
    assert torch.equal(tied.embedding(ids), tied.embedding.reference(ids))


def test_traced_and_compiled() -> None:
    tied = Tied(50, 8, smoothed=True)
    ids = torch.randint(0, 50, (3, 4))
    compiled = torch.compile(tied, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), tied(ids))


def test_a_scale_of_its_own_is_applied_after_the_rounding() -> None:
    linear = nn.Linear(8, 50, bias=False)
    head = QuantLinear.from_float(linear, Scheme(activations="per_token_x2"))
    ids = torch.arange(50)
    for dtype in DTYPES:
        embedding = QuantEmbedding(head, Scaled(50, 8, scale=3.3)).to(dtype)
        plain = QuantEmbedding(head, nn.Embedding(50, 8)).to(dtype)
        scaled = plain(ids) * torch.tensor(3.3, dtype=dtype)
        assert torch.equal(embedding(ids), scaled)
        assert torch.equal(embedding.reference(ids), scaled)
        assert embedding.weight.dtype == dtype
        assert embedding.weight.shape == (50, 8)


def test_what_does_more_than_look_up_is_told() -> None:
    assert is_lookup(nn.Embedding(50, 8))
    assert is_lookup(nn.Embedding(50, 8, padding_idx=3))
    assert is_lookup(Scaled(50, 8, padding_idx=0, scale=0.1))
    for other in (Offset(50, 8), nn.Embedding(50, 8, max_norm=1.0), nn.EmbeddingBag(50, 8)):
        assert not is_lookup(other)
    head = QuantLinear.from_float(nn.Linear(8, 50), Scheme())
    with pytest.raises(SqCpuError, match="a Offset does more than look up"):
        QuantEmbedding(head, Offset(50, 8))
    with pytest.raises(SqCpuError, match=r"the embedding is \[51, 8\], the head \[50, 8\]"):
        QuantEmbedding(head, nn.Embedding(51, 8))
