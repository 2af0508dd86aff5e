"""Inputs that the forward of any tiny model takes, found by the names of its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tiny_types import BATCH, HEADS, ORDINARY, WIDTH
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

Inputs = dict[str, Any]


def setting(config: PreTrainedConfig, *names: str) -> Any:
    """Return the first setting of these names, the configuration's own before nested ones'."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    for nested in vars(config).values():
        if isinstance(nested, PreTrainedConfig):
            value = setting(nested, *names)
            if value is not None:
                return value
    return None


def _side(value: Any, default: int) -> int:
    if isinstance(value, dict):
        value = next(iter(value.values()))
    if isinstance(value, list | tuple):
        value = value[-1]
    return value if isinstance(value, int) and value > 0 else default


class Maker:
    """Makes the inputs of one model; `length` tokens, of which the last row's end is padding."""

    def __init__(
        self,
        model: Any,
        seed: int,
        length: int,
        placeholders: int | None = None,
        columns: int | None = None,
    ) -> None:
        self.placeholders = placeholders  # tokens that stand for an image; None: as found
        self.columns = columns  # values of a patch; None: as configured
        self.model = model
        self.config = model.config
        self.length = length
        self.generator = torch.Generator().manual_seed(seed)
        self.arguments = inspect.signature(model.forward).parameters
        config = self.config
        vision = getattr(config, "vision_config", None) or config
        self.side = _side(setting(vision, "image_size", "img_size", "input_size"), 32)
        self.patch = _side(setting(vision, "patch_size"), 8)
        self.channels = _side(setting(vision, "num_channels", "in_channels", "in_chans"), 3)
        self.mels = _side(
            setting(config, "num_mel_bins", "input_feat_per_channel", "feature_size"), 16
        )
        self.width = _side(setting(config, "hidden_size", "d_model", "n_embd"), WIDTH)

    def random(self, *shape: int) -> Tensor:
        """Return normal values, fp32."""
        return torch.randn(shape, generator=self.generator)

    def ids(self, length: int) -> Tensor:
        """Return ordinary token ids, int64 [BATCH, length]."""
        return torch.randint(3, ORDINARY, (BATCH, length), generator=self.generator)

    def has(self, *names: str) -> bool:
        """Say whether the forward has all of these arguments."""
        return all(name in self.arguments for name in names)

    def text(self) -> Inputs:
        """Return what stands for text, with a mask, and shorter decoder input."""
        made: Inputs = {}
        if self.has("input_ids"):
            made["input_ids"] = self.ids(self.length)
            if self.has("attention_mask"):
                mask = torch.ones(BATCH, self.length, dtype=torch.int64)
                mask[-1, -3:] = 0
                made["attention_mask"] = mask
            if self.has("bbox"):
                made["bbox"] = torch.zeros(BATCH, self.length, 4, dtype=torch.int64)
            if self.has("image_attention_mask"):
                mask = torch.ones(BATCH, self.length, 1, dtype=torch.int64)
                made["image_attention_mask"] = mask
            if self.has("qformer_input_ids"):
                made["qformer_input_ids"] = self.ids(5)
            if self.has("visual_feats"):
                width = _side(setting(self.config, "visual_feat_dim"), WIDTH)
                made["visual_feats"] = self.random(BATCH, 5, width)
                made["visual_pos"] = self.random(BATCH, 5, 4).sigmoid()
        if self.has("decoder_input_ids"):
            made["decoder_input_ids"] = self.ids(self.length - 3)
        return made

    def images(self) -> Iterator[Inputs]:
        """Yield layouts in which models take images."""
        c, s, p = self.channels, self.side, self.patch
        if self.has("image_grid_thw") or self.has("grid_thw") or self.has("grid_hw"):
            vision = getattr(self.config, "vision_config", None) or self.config
            frames = _side(getattr(vision, "temporal_patch_size", None), 1)
            grid = torch.tensor([[1, 4, 4]] * BATCH)
            rows = 16 * BATCH
            flat = self.columns or c * frames * p * p
            for shape in ((rows, flat), (rows, c, p, p), (1, rows, c, p, p)):
                pixels = self.random(*shape)
                if self.has("image_grid_thw"):
                    yield {"pixel_values": pixels, "image_grid_thw": grid}
                elif self.has("grid_thw"):
                    first = next(iter(self.arguments))
                    yield {first: pixels, "grid_thw": grid}
        if self.has("flattened_patches"):
            patches = self.random(BATCH, 16, 2 + (self.columns or c * p * p))
            patches[..., :2] = torch.arange(1, 17)[:, None]  # the row and the column of a patch
            yield {"flattened_patches": patches}
            return
        if self.has("spatial_shapes"):
            shapes = torch.tensor([[4, 4]] * BATCH)
            made = {"pixel_values": self.random(BATCH, 16, c * p * p), "spatial_shapes": shapes}
            mask = torch.ones(BATCH, 16, dtype=torch.int64)
            yield made | {"pixel_attention_mask": mask}
            yield made | {"attention_mask": mask}
        if self.has("image_sizes"):
            sizes = torch.tensor([[s, s]] * BATCH)
            yield {"pixel_values": self.random(BATCH, 3, c, s, s), "image_sizes": sizes}
            yield {"pixel_values": self.random(BATCH, c, s, s), "image_sizes": sizes}
        yield {"pixel_values": self.random(BATCH, c, s, s)}
        yield {"pixel_values": self.random(BATCH, 1, c, s, s)}
        frames = _side(setting(self.config, "num_frames", "frames_per_clip"), 2)
        yield {"pixel_values": self.random(BATCH, frames, c, s, s)}
        yield {"pixel_values": self.random(BATCH, 16, c * p * p)}

    def sounds(self) -> Iterator[Inputs]:
        """Yield layouts in which models take sound."""
        frames = _side(setting(self.config, "max_length"), 0)
        frames = frames or 2 * _side(setting(self.config, "max_source_positions"), 20)
        if self.has("input_features"):
            for shape in (
                (self.mels, frames),
                (frames, self.mels),
                (1, self.mels, frames),
                (1, frames, self.mels),
            ):
                features = self.random(BATCH, *shape)
                yield {"input_features": features}
                mask = torch.ones(BATCH, frames, dtype=torch.int64)
                if self.has("input_features_mask"):
                    yield {"input_features": features, "input_features_mask": mask.bool()}
                if self.has("feature_attention_mask"):
                    yield {"input_features": features, "feature_attention_mask": mask}
        if self.has("input_values"):
            yield {"input_values": self.random(BATCH, 4000)}
            yield {"input_values": self.random(BATCH, 1, 4000)}
            yield {"input_values": self.random(BATCH, frames, self.mels)}
        if self.has("audio_values"):
            yield {"audio_values": self.random(BATCH, 1, 4000)}

    def series(self) -> Iterator[Inputs]:
        """Yield what forecasters take."""
        length = _side(setting(self.config, "context_length"), 32)
        channels = _side(setting(self.config, "num_input_channels", "input_size"), 1)
        values = self.random(BATCH, length, channels)
        yield {"past_values": values}
        yield {"past_values": values[..., 0]}
        history = length + max(getattr(self.config, "lags_sequence", None) or [0])
        future = _side(getattr(self.config, "prediction_length", None), 4)
        made = {
            "past_values": self.random(BATCH, history),
            "past_time_features": self.random(BATCH, history, 1),
            "past_observed_mask": torch.ones(BATCH, history),
        }
        yield made
        yield made | {
            "future_values": self.random(BATCH, future),
            "future_time_features": self.random(BATCH, future, 1),
        }

    def decisions(self) -> Iterator[Inputs]:
        """Yield what a decision transformer takes."""
        states = _side(setting(self.config, "state_dim"), 4)
        actions = _side(setting(self.config, "act_dim"), 4)
        times = torch.arange(self.length)[None].expand(BATCH, -1)
        yield {
            "states": self.random(BATCH, self.length, states),
            "actions": self.random(BATCH, self.length, actions),
            "rewards": self.random(BATCH, self.length, 1),
            "returns_to_go": self.random(BATCH, self.length, 1),
            "timesteps": times,
            "attention_mask": torch.ones(BATCH, self.length, dtype=torch.int64),
        }

    def states(self) -> Iterator[Inputs]:
        """Yield hidden states, for the parts of models."""
        for name in ("inputs_embeds", "hidden_states", "query_embeds", "x"):
            if self.has(name):
                made = {name: self.random(BATCH, self.length, self.width)}
                if self.has("encoder_hidden_states"):
                    width = _side(setting(self.config, "encoder_hidden_size"), self.width)
                    yield made | {"encoder_hidden_states": self.random(BATCH, 7, width)}
                yield made

    def others(self, made: Inputs) -> Inputs:
        """Return what is required beside what was made, as far as its name tells."""
        known: dict[str, Callable[[], Any]] = {
            "input_ids": lambda: self.ids(self.length),
            "encoder_hidden_states": lambda: self.random(BATCH, 7, self.width),
            "context": lambda: self.random(BATCH, 7, self.width),
            "inputs_embeds": lambda: self.random(BATCH, self.length, self.width),
            "attention_mask": lambda: torch.ones(BATCH, self.length, dtype=torch.int64),
            "position_ids": lambda: torch.arange(self.length)[None].expand(BATCH, -1),
            "bbox": lambda: torch.zeros(BATCH, self.length, 4, dtype=torch.int64),
            "timestep": lambda: torch.tensor([3] * BATCH),
            "task_inputs": lambda: self.ids(_side(setting(self.config, "task_seq_len"), 77)),
            "num_heads": lambda: HEADS,
        }
        skipped = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return {
            name: known[name]()
            for name, argument in self.arguments.items()
            if argument.default is inspect.Parameter.empty
            and argument.kind not in skipped
            and name not in made
            and name in known
        }

    def candidates(self) -> Iterator[Inputs]:
        """Yield inputs to try; those that reach most of the model first."""
        text = self.text()
        other: list[Inputs] = []
        if any(map(self.has, ("pixel_values", "grid_thw", "flattened_patches"))):
            other += self.images()
        if self.has("input_features") or self.has("input_values") or self.has("audio_values"):
            other += self.sounds()
        if self.has("past_values"):
            other += self.series()
        if self.has("returns_to_go"):
            other += self.decisions()
        for made in other:
            if text:
                yield from self._with_placeholders(text | made)
            if "input_ids" not in text and text:
                continue
            yield made | self.others(made)
        if text:
            yield text | self.others(text)
        for made in (*other, *self.states(), {}):
            without = {name: value for name, value in made.items() if name in self.arguments}
            yield without | self.others(without)

    def _with_placeholders(self, inputs: Inputs) -> Iterator[Inputs]:
        """Yield inputs with as many of the tokens that stand for an image as it has features."""
        token = None
        for name in ("image_token_id", "image_token_index", "audio_token_id", "audio_token_index"):
            is_audio = name.startswith("audio")
            if is_audio != ("pixel_values" not in inputs):
                continue
            token = token if token is not None else setting(self.config, name)
        if token is None or "input_ids" not in inputs:
            yield inputs
            return
        number = self.placeholders or self._features(inputs)
        for each in dict.fromkeys(n for n in (number, self.side // self.patch) if n):
            ids = self.ids(self.length + each)
            ids[:, 2 : 2 + each] = token
            made = inputs | {"input_ids": ids}
            if "attention_mask" in inputs and inputs["attention_mask"].dim() == 2:
                mask = torch.ones_like(ids)
                mask[-1, -3:] = 0
                made["attention_mask"] = mask
            if self.has("mm_token_type_ids"):
                made["mm_token_type_ids"] = (ids == token).long()
            if self.has("token_type_ids"):
                made["token_type_ids"] = (ids == token).long()
            yield made

    def _features(self, inputs: Inputs) -> int | None:
        """Return how many features an image of these inputs has."""
        for name in ("get_image_features", "get_audio_features"):
            for owner in (self.model, getattr(self.model, "model", None)):
                get = getattr(owner, name, None)
                if get is None or (name == "get_image_features") != ("pixel_values" in inputs):
                    continue
                taken = inspect.signature(get).parameters
                try:
                    with torch.no_grad():
                        features = get(**{k: v for k, v in inputs.items() if k in taken})
                except Exception:  # a layout that the model does not take
                    continue
                found = getattr(features, "pooler_output", None)
                found = tensors(features if found is None else found)
                if found:
                    return sum(f.numel() // f.shape[-1] for f in found[:BATCH]) // BATCH
        return None


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a model's output, caches left out."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Cache):
        return []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [tensor for item in output for tensor in tensors(item)]
    return []
