"""An embedding that reads the int8 weight of the head that it is tied to: one copy of both."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.embedding import gather_rows
from sq_cpu.nn.linear import QuantLinear

__all__ = ["QuantEmbedding", "embedding_reference", "is_lookup"]


def embedding_reference(
    ids: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    smoothing: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Compute in plain torch what `QuantEmbedding` looks up, before its own scale.

    Parameters
    ----------
    ids : integers [...]
    weight : int8 [num_embeddings, embedding_dim], the head's
    weight_scale : fp32 [num_embeddings]
    smoothing : s, fp32 [embedding_dim], by which the head divides its input; None: ones

    Returns
    -------
    [..., embedding_dim] of `dtype`
    """
    ids = ids.long()
    rows = weight[ids].float() * weight_scale[ids][..., None]
    return (rows if smoothing is None else rows * (1 / smoothing)).to(dtype)


def is_lookup(module: nn.Module) -> bool:
    """Tell whether a module gives rows of its weight, times its `embed_scale` if it has one.

    It is called to find out, with a weight of two columns; subclasses may do anything. One that
    changes its weight while it looks up (`max_norm`) is none.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    count = module.num_embeddings
    weight = torch.randn(
        count, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu"
    )
    shell = copy.copy(module)  # the module, but for its weight
    shell._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    ids = torch.arange(-min(count, 50), min(count, 50), device="cpu")[None] % max(count, 1)
    try:
        return torch.equal(shell(ids), _scaled(weight[ids], getattr(module, "embed_scale", None)))
    except Exception:  # whatever it needs that an embedding has not
        return False


def _scaled(rows: Tensor, scale: Tensor | float | None) -> Tensor:
    if scale is None:
        return rows
    return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


class QuantEmbedding(nn.Module):
    """The lookup of a tied model: rows of its head's packed int8 weight, as floats.

    y = W[ids] * weight_scale[ids] / smoothing, rounded to `dtype`, times `embed_scale` if there is
    one. It has no weight of its own: the head's is read at each call, and the state_dict is empty.

    Attributes
    ----------
    dtype : of the result: of the float embedding, or of the last `.to(dtype)`
    embed_scale : that of the embedding that it stands for (Gemma, Bart), a buffer or a number
    """

    embed_scale: Tensor | float | None

    def __init__(self, head: QuantLinear, embedding: nn.Embedding) -> None:
        """Stand for `embedding`, whose weight the head has.

        Raises
        ------
        SqCpuError
            When the head's weight has another shape or is rotated (`hadamard`), and for a module
            that does more than `is_lookup` finds.
        """
        super().__init__()
        if not is_lookup(embedding):
            raise SqCpuError(f"a {type(embedding).__name__} does more than look up: keep it float")
        self.num_embeddings = embedding.num_embeddings
        self.embedding_dim = embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        self.dtype = embedding.weight.dtype
        if (head.out_features, head.in_features) != (self.num_embeddings, self.embedding_dim):
            raise SqCpuError(
                f"the embedding is [{self.num_embeddings}, {self.embedding_dim}], the head "
                f"[{head.out_features}, {head.in_features}]: they are not tied"
            )
        if head.hadamard:
            raise SqCpuError("an embedding cannot read the rotated weight of its head: hadamard=0")
        scale = getattr(embedding, "embed_scale", None)
        if isinstance(scale, Tensor):
            self.register_buffer("embed_scale", scale, persistent=False)
        else:
            self.embed_scale = scale
        # No submodule: the head's place in the model is another.
        self.__dict__["_head"] = head

    @property
    def head(self) -> QuantLinear:
        """The linear whose weight this reads."""
        head: QuantLinear = self.__dict__["_head"]
        return head

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight, no values (see `QuantLinear.weight`)."""
        return self.head.packed_weight.unreadable(self.dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  as nn.Embedding names it
        """Return [..., embedding_dim] for ids `input`, int64 or int32 [...].

        Raises
        ------
        SqCpuError
            For an id that is out of range, and ids of another dtype or device.
        """
        head = self.head
        rows = gather_rows(
            input,
            head.packed,
            self.num_embeddings,
            self.embedding_dim,
            head.inverse_smoothing,
            self.dtype,
        )
        return _scaled(rows, self.embed_scale)

    def reference(self, ids: Tensor) -> Tensor:
        """Return what `forward` returns, computed in plain torch by `embedding_reference`."""
        head = self.head
        weight, scale = head.weight_int8(), head.weight_scale
        rows = embedding_reference(ids, weight, scale, head.smoothing, self.dtype)
        return _scaled(rows, self.embed_scale)

    def extra_repr(self) -> str:
        """Return the shape, for `print(model)`."""
        return f"{self.num_embeddings}, {self.embedding_dim}, int8 of the head"

    def _apply(self, fn: Any, recurse: bool = True) -> QuantEmbedding:
        # As QuantLinear's: the dtype follows, which no tensor has.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self
