"""Publishing: a folder as one commit, and the methods with which a model publishes itself."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers import PreTrainedModel

from .card import make_card
from .checkpoint import first_line
from .export import add_code


def push(
    folder: str | os.PathLike, repo_id: str, token: str | None = None, private: bool | None = None, **options
) -> str:
    """Publish a folder as one commit: what fails before the commit is made has published nothing.

    Args:
        options: passed to `HfApi.create_commit`.

    Returns:
        The address of the commit.

    Raises:
        OSError: it was not published; the message says why.
    """
    api = HfApi(token=token)
    options = {"commit_message": "Upload with dllm_hf", **options}
    folder = Path(folder)
    files = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    committing = False
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        # `upload_folder` would make several commits of many files.
        api.preupload_lfs_files(repo_id, files, free_memory=False)
        committing = True
        return api.create_commit(repo_id, files, **options).commit_url
    except Exception as error:  # versions of huggingface_hub differ in the HTTP library whose errors they let through
        reason = first_line(error)
        if committing and not isinstance(error, HfHubHTTPError):
            raise OSError(
                f"{repo_id} may not have been published: {reason}. The connection was lost while the commit was made: "
                "look whether it is there, or push again."
            ) from error
        raise OSError(
            f"{repo_id} was not published: {reason}. The files go in one commit, so nothing of this upload is visible "
            "there. Check the token (`hf auth login`), its right to write, and the network, then push again: what has "
            "been uploaded is not sent twice."
        ) from error


def add_saving_with_code(model_class: type[PreTrainedModel]) -> None:
    """Give a class `save_pretrained(..., include_code=True)`, and a `push_to_hub` that includes the code.

    The classes do not inherit these methods: their files are part of the repositories, and this module is not.
    """
    inherited: Callable[..., None] = model_class.save_pretrained

    def save_pretrained(self, save_directory, *args, include_code: bool = False, push_to_hub: bool = False, **kwargs):
        """As in transformers; with `include_code` the folder is a repository that runs without dllm_hf."""
        if push_to_hub and include_code:
            raise ValueError(
                "`push_to_hub=True` with `include_code=True`: call `model.push_to_hub(...)`, which does both."
            )
        inherited(self, save_directory, *args, push_to_hub=push_to_hub, **kwargs)
        if include_code:
            folder = Path(save_directory)
            add_code(folder, self.config)
            if not (folder / "README.md").exists():
                card = make_card(self.config, folder.resolve().name, None, {})
                (folder / "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        include_code: bool = True,
        token: str | None = None,
        private: bool | None = None,
        max_shard_size: int | str = "50GB",
        tokenizer=None,
        **options,
    ) -> str:
        """Publish the model as one commit, with the code that it needs (`include_code=False`: without) and, if given,
        its tokenizer. `options`: of `HfApi.create_commit`. Raises an `OSError` if it was not published."""
        with tempfile.TemporaryDirectory() as folder:
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            self.save_pretrained(folder, max_shard_size=max_shard_size, include_code=include_code)
            card = make_card(self.config, repo_id, None, {})
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            return push(folder, repo_id, token, private, **options)

    for method in (save_pretrained, push_to_hub):
        setattr(model_class, method.__name__, method)
