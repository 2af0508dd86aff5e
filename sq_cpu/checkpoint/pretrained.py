"""`save_pretrained` and `push_to_hub` of an int8 model: `save`, with transformers' arguments.

They stand on the model in the place of its class's own, which would write the weights of a float
model. So `Trainer.save_model` and `SentenceTransformer.save`, which call them, write checkpoints.
"""

from __future__ import annotations

import inspect
import os
import tempfile
import weakref
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from sq_cpu.checkpoint.card import CARD, tagged
from sq_cpu.checkpoint.config import read_written
from sq_cpu.checkpoint.folder import staged
from sq_cpu.checkpoint.save import save_staged
from sq_cpu.errors import SqCpuError

__all__ = ["PushToHub", "SavePretrained"]

# What both take that is for the upload.
_OF_UPLOAD = ("commit_message", "commit_description", "revision", "create_pr")


class _OfModel:
    """A method on an instance, without a hold on it; copied and pickled along with it."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)

    @property
    def model(self) -> Any:
        model = self._model()
        if model is None:
            raise SqCpuError("the model that this method was taken from is gone")
        return model

    def __reduce__(self) -> Any:
        return type(self), (self.model,)


class SavePretrained(_OfModel):
    """`model.save_pretrained`."""

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Any = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        variant: str | None = None,
        token: str | bool | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        distributed_checkpoint: bool = False,
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write the model to a folder as `sq_cpu.save` does; other files in it stay.

        The arguments are those of transformers. `kwargs` are for the upload (`repo_id`, `private`,
        `commit_message`, `commit_description`, `revision`, `create_pr`).

        Of a model with adapters (`add_adapter`), these are written, as transformers does.

        Raises
        ------
        SqCpuError
            As `sq_cpu.save` does, and for arguments that a checkpoint of int8 weights cannot
            follow: a `state_dict`, a `variant`, `distributed_checkpoint=True`,
            `safe_serialization=False`, and any that is not known.
        """
        model = self.model
        refused = {
            "variant": variant is not None,
            "distributed_checkpoint": distributed_checkpoint,
            "safe_serialization=False": not safe_serialization,
        }
        if getattr(model, "_hf_peft_config_loaded", False):
            _refuse(refused)
            type(model).save_pretrained(
                model,
                save_directory,
                is_main_process=is_main_process,
                state_dict=state_dict,
                push_to_hub=push_to_hub,
                max_shard_size=max_shard_size,
                token=token,
                save_peft_format=save_peft_format,
                **kwargs,
            )
            return
        refused["state_dict"] = state_dict is not None
        known = ("repo_id", "private", *_OF_UPLOAD) if push_to_hub else ()
        _refuse(refused | {name: True for name in kwargs if name not in known})
        if not is_main_process:
            return
        with staged(save_directory, keep=True) as staging:
            save_staged(staging, model, max_shard_size=max_shard_size)
        if push_to_hub:
            folder = Path(save_directory)
            _upload(folder, kwargs.pop("repo_id", folder.resolve().name), token, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        parameters = list(inspect.signature(type(self).__call__).parameters.values())
        return inspect.Signature(parameters[1:])


class PushToHub(_OfModel):
    """`model.push_to_hub`."""

    def __call__(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "5GB",
        tags: list[str] | None = None,
    ) -> str:
        """Write the model as `save_pretrained` does, and upload that; return the commit's address.

        A README.md that the repository has stays as it is; else it is the model card, with `tags`.
        """
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            self.model.save_pretrained(folder, max_shard_size=max_shard_size or "5GB")
            if tags:
                tagged(folder, tags)
            return _upload(
                folder,
                repo_id,
                token,
                private=private,
                commit_message=commit_message,
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def _refuse(arguments: Mapping[str, bool]) -> None:
    """Raise `SqCpuError` for the first of these that was given."""
    if named := [name for name, given in arguments.items() if given]:
        raise SqCpuError(f"save_pretrained of an int8 model cannot follow {named[0]}: leave it out")


def _upload(
    folder: Path,
    repo_id: str,
    token: str | bool | None,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    **options: Any,
) -> str:
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    has_card = api.file_exists(repo_id, CARD, revision=options.get("revision"))
    return str(
        api.upload_folder(
            folder_path=folder,
            repo_id=repo_id,
            commit_message=commit_message or "Upload int8 model",
            # Nothing else that lies there, as `save_pretrained` leaves what it finds.
            allow_patterns=[escape(name) for name in sorted(read_written(folder))],
            ignore_patterns=[CARD] if has_card else None,
            **options,
        )
    )
