"""`AutoModelForCausalLM.from_pretrained("out/")` for what `sq_cpu.save` wrote.

Or of a float model, with `quantization_config=SqCpuConfig(...)`, which is quantized then.

Importing this module registers the method "sq_cpu" with transformers, which then builds the model
and its generation config, with the caller's options, while `sq_cpu.checkpoint` checks the files and
fills the weights, so that the result is the model that `sq_cpu.load` returns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.quantizers import HfQuantizer, register_quantizer

from sq_cpu.checkpoint import hf_config  # whose import may be under way, and brings this one
from sq_cpu.checkpoint.card import carry_card
from sq_cpu.checkpoint.config import (
    CONFIG,
    FORMAT_VERSION,
    QUANT_METHOD,
    check_dtype,
    check_files,
    check_settings,
    record_of_settings,
)
from sq_cpu.checkpoint.curves import with_stored_curves
from sq_cpu.checkpoint.dequantize import dequantize
from sq_cpu.checkpoint.heads import Translation, translation
from sq_cpu.checkpoint.pretrained import PushToHub, SavePretrained
from sq_cpu.checkpoint.rebuild import fit, restore
from sq_cpu.checkpoint.skeleton import check_buffers, check_counts
from sq_cpu.checkpoint.stored import StoredTensors
from sq_cpu.errors import SqCpuError
from sq_cpu.models.hf_private import is_transformers, load_again, load_nothing
from sq_cpu.models.linears import linearized
from sq_cpu.parsing import read_json
from sq_cpu.quantization.record import QuantizationRecord
from sq_cpu.quantization.replace import when_quantized

__all__ = ["SqCpuQuantizer"]


@register_quantizer(QUANT_METHOD)
class SqCpuQuantizer(HfQuantizer):  # type: ignore[misc]
    """What `from_pretrained` calls on its way. All errors are `SqCpuError`, of one line."""

    def __init__(
        self, quantization_config: Any, *, pre_quantized: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(quantization_config, pre_quantized=pre_quantized, **kwargs)
        if pre_quantized:
            # Before any file is looked for: a newer format may name them otherwise.
            check_settings(self._settings, Path(CONFIG))
        self._dtype: torch.dtype | None = None
        self._folder = Path()
        self._files: list[str] = []
        self._before: tuple[Any, Any] = (None, {})
        self._translation: Translation | None = None

    @property
    def _settings(self) -> Mapping[str, Any]:
        return vars(self.quantization_config)

    def validate_environment(self, *, device_map: Any = None, **_: Any) -> None:
        """Refuse every device but the CPU; a string, as "auto", leaves the choice to us."""
        for device in device_map.values() if isinstance(device_map, dict) else ():
            if str(device).partition(":")[0] != "cpu":
                raise SqCpuError(
                    f"device_map asks for {device}, but sq_cpu runs on the CPU only; "
                    'leave it out or give device_map="cpu"'
                )

    def update_device_map(self, device_map: Any, **_: Any) -> Any:
        """Let "auto" mean the CPU, whatever else the machine has."""
        return {"": torch.device("cpu")} if isinstance(device_map, str) else device_map

    def update_attn_implementation(self, config: Any, **_: Any) -> Any:
        """Look at the config before a model is built from it: its counts have to be possible."""
        folder = Path(str(config.name_or_path))
        if self.pre_quantized and (folder / CONFIG).is_file():
            with StoredTensors(folder, check_files(folder, self._settings, verify=False)) as stored:
                check_counts(config.to_dict(), len(stored.headers), folder / CONFIG)
        return config

    def update_dtype(self, dtype: torch.dtype, **_: Any) -> torch.dtype:
        """Note the dtype of everything that is not quantized."""
        check_dtype(dtype)
        self._dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, *, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        """Check the model and its files, and leave transformers no weight to load."""
        if not self.pre_quantized:
            return
        if not checkpoint_files:
            raise SqCpuError("from_pretrained needs the folder of an sq_cpu checkpoint: give it")
        self._folder = folder = Path(checkpoint_files[0]).parent
        self._check_model(model)
        self._files = check_files(folder, self._settings, verify=True)
        ours = {folder / name for name in self._files}
        if foreign := {Path(file) for file in checkpoint_files} - ours:
            raise SqCpuError(
                f"{min(foreign)} is not a file of this checkpoint; remove it, or what names it "
                "(an index, an argument)"
            )
        with StoredTensors(folder, self._files) as stored:
            record, stored, is_new = self._translated(model, self._record, stored)
            with linearized(model):
                found = fit(
                    model,
                    record,
                    stored.headers,
                    self._version,
                    folder,
                    stored.path,
                    is_new=is_new,
                )
            check_buffers(model, stored.nbytes, folder / CONFIG)
        dropped = () if self._translation is None else self._translation.dropped
        # transformers would hold all int8 weights unpacked beside the packed ones.
        self._before = load_nothing(model, found.new, dropped)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        """Fill the weights as `sq_cpu.load` does, or quantize those of a float model."""
        if not self.pre_quantized:
            model.hf_quantizer = None  # so far it is a float model
            self.quantization_config.quantize(model.eval())
            return
        load_again(model, self._before)
        folder = self._folder
        record = with_stored_curves(self._record, folder, self._settings)
        # The stored dtype is also what "auto" comes to, and models may mix dtypes: then as stored.
        content = read_json(folder / CONFIG)
        stored_dtype = content.get("dtype", content.get("torch_dtype"))
        dtype = None if str(self._dtype).removeprefix("torch.") == stored_dtype else self._dtype
        with StoredTensors(folder, self._files) as stored:
            record, stored, is_new = self._translated(model, record, stored)
            restore(model, record, stored, self._version, folder, dtype, is_new=is_new)
        carry_card(model, folder, is_same=self._translation is None)

    def _translated(
        self, model: Any, record: QuantizationRecord, stored: StoredTensors
    ) -> tuple[QuantizationRecord, StoredTensors, Callable[[str], bool]]:
        """Return both as the model's class names them, and which tensors of it may be new."""
        if type(model).__name__ == self._architecture(model):
            return record, stored, lambda _: False
        if self._translation is None:
            self._translation = translation(model, record, stored.headers)
        found = self._translation
        return found.record(record), stored.renamed(found.names), found.is_new

    @property
    def _record(self) -> QuantizationRecord:
        return record_of_settings(self._settings, self._folder / CONFIG)

    @property
    def _version(self) -> int:
        version: int = self._settings["format_version"]
        return version

    def _architecture(self, model: Any) -> str:
        named = model.config.architectures
        return str(named[0]) if isinstance(named, list) and named else "unknown model"

    def _check_model(self, model: Any) -> None:
        name = self._architecture(model)
        # Of the same model, another class: its base alone, or another head.
        known: Any = getattr(transformers, name, None)
        kin = isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)
        kin = kin and isinstance(model.config, known.config_class or ())
        if type(model).__name__ != name and not kin:
            raise SqCpuError(
                f"{self._folder} holds a {name}, not a {type(model).__name__}; "
                f"load it with transformers.{name}"
            )
        if getattr(model.config, "distributed_config", None) is not None:
            raise SqCpuError(
                "a checkpoint of sq_cpu is loaded whole by one process; "
                "leave out tp_plan and distributed_config"
            )

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None, **_: Any) -> Any:
        """Make the model a float one, for `model.dequantize()`."""
        return dequantize(model, dtype)

    def is_serializable(self, **_: Any) -> bool:
        """Return True: `save_pretrained` of the model is `sq_cpu.save`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters beside the int8 layers are trained (`sq_cpu.with_int8_layers`)."""
        return True

    @property
    def is_compileable(self) -> bool:
        """True: torch.compile takes the int8 layers whole."""
        return True


def _tell_transformers(model: Any) -> None:
    """Give an int8 model what transformers' own code asks a quantized one for.

    Not `is_quantized`, with which a Trainer refuses also to evaluate: from_pretrained sets that.
    """
    if not is_transformers(model):
        return
    record: QuantizationRecord = model.sq_cpu_config
    settings = hf_config.SqCpuConfig(
        quant_method=QUANT_METHOD, format_version=FORMAT_VERSION, **record.to_dict()
    )
    _own_config(model).quantization_config = settings
    model.hf_quantizer = SqCpuQuantizer(settings)
    model.quantization_method = QUANT_METHOD
    model.save_pretrained = SavePretrained(model)
    model.push_to_hub = PushToHub(model)


def _own_config(model: Any) -> Any:
    """Return the model's config, a copy for it and its parts: other models may share theirs."""
    shared, own = model.config, copy.copy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    return own


when_quantized(_tell_transformers)
