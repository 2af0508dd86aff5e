"""Two small vision models trained on the digits that scikit-learn carries, in a minute or less.

The ViT is a model type of transformers. The denoiser is what no table knows: a diffusion
transformer (DiT, arXiv 2212.09748) whose norms have no weights and whose blocks are modulated by
the noise level.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

TRAINING = 1500  # of 1797 images; the rest is for evaluation
_PATCH, _WIDTH, _HEADS, _LAYERS = 2, 64, 4, 4
_PATCHES = (8 // _PATCH) ** 2


def load_digits(file: Path) -> tuple[Tensor, Tensor]:
    """Return images in [-1, 1], fp32 [1797, 1, 8, 8], and classes, int64 [1797]."""
    with gzip.open(file, "rt", encoding="ascii") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :64]).reshape(-1, 1, 8, 8) / 8 - 1
    return images, torch.from_numpy(table[:, 64]).long()


def make_vit() -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=_PATCH,
            num_channels=1,
            hidden_size=_WIDTH,
            num_hidden_layers=_LAYERS,
            num_attention_heads=_HEADS,
            intermediate_size=4 * _WIDTH,
            num_labels=10,
        )
    )


class Block(nn.Module):
    """A transformer block, shifted, scaled and gated by what the condition says (adaLN)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(_WIDTH, elementwise_affine=False)
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.proj = nn.Linear(_WIDTH, _WIDTH)
        self.norm2 = nn.LayerNorm(_WIDTH, elementwise_affine=False)
        self.fc1 = nn.Linear(_WIDTH, 4 * _WIDTH)
        self.fc2 = nn.Linear(4 * _WIDTH, _WIDTH)
        self.modulation = nn.Linear(_WIDTH, 6 * _WIDTH)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Return the next x, both [images, patches, width]; condition: [images, 1, width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=-1)
        qkv = self.qkv(self.norm1(x) * (1 + scale1) + shift1).unflatten(-1, (3, _HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate1 * self.proj(attended)
        hidden = self.fc1(self.norm2(x) * (1 + scale2) + shift2)
        x = x + gate2 * self.fc2(F.gelu(hidden))
        return x


class Denoiser(nn.Module):
    """Predicts the noise, [images, 1, 8, 8], in images whose share of noise is `level`, [images].

    A noisy image is cos(level pi / 2) image + sin(level pi / 2) noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.embed = nn.Linear(_PATCH**2, _WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(_PATCHES, _WIDTH))
        self.time = nn.Sequential(nn.Linear(32, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(_WIDTH, elementwise_affine=False)
        self.head = nn.Linear(_WIDTH, _PATCH**2)
        self.register_buffer("frequencies", torch.pi * 2.0 ** torch.linspace(0, 6, 16))

    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        """Return the predicted noise."""
        angles = level[:, None] * self.frequencies
        condition = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))[:, None]
        x = self.embed(F.unfold(noisy, _PATCH, stride=_PATCH).transpose(1, 2)) + self.position
        for block in self.blocks:
            x = block(x, F.silu(condition))
        return F.fold(self.head(self.norm(x)).transpose(1, 2), (8, 8), _PATCH, stride=_PATCH)


def add_noise(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy images, their levels and the noise, all drawn from `generator`."""
    noise = torch.randn(images.shape, generator=generator)
    level = torch.rand(len(images), generator=generator)
    angle = (level * torch.pi / 2)[:, None, None, None]
    return angle.cos() * images + angle.sin() * noise, level, noise


def train(model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor], epochs: int) -> nn.Module:
    """Train on the first images with AdamW and a one-cycle schedule; `loss` takes their indices."""
    batch = 100
    steps = epochs * (TRAINING // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small gain nothing from more
    model.train()
    try:
        for _ in range(epochs):
            for indices in torch.split(torch.randperm(TRAINING, generator=generator), batch):
                value: Any = loss(model, indices)
                optimizer.zero_grad()
                value.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
    finally:
        torch.set_num_threads(threads)
    return model.eval()
