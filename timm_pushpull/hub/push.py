"""Uploads the folder of a model to the Hugging Face Hub."""

import os
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from ..errors import InputError
from ..registry import CARD, CHECKSUM, CONFIG, RECIPE, read_checksum
from ..weights import WEIGHTS
from .check import check_folder

__all__ = ['push_folder']


def push_folder(
    folder: str | os.PathLike[str],
    org: str,
    confirm: Callable[[str], bool],
    private: bool = False,
    revision: str | None = None,
) -> str | None:
    """Upload the folder of a model to its repository on the Hub, made if it does not exist.

    Unchanged files are not uploaded again. The weights of a repository are never replaced: installed releases of this
    package know their checksum.

    Args:
        folder: Folder of the model.
        org: Organisation or user on the Hub.
        confirm: Called with a description of the upload; False cancels it.
        private: Make a new repository private; an existing repository keeps its visibility.
        revision: Git tag for the uploaded commit; None for no tag.

    Returns:
        Address of the commit; None if the upload was cancelled.

    Raises:
        ValueError: If :func:`check_folder` finds a fault, if the folder has no weights, if the repository has other
            weights, if the git tag is at another commit, or if the Hub refuses.
    """
    folder = Path(folder)
    check_folder(folder)
    sha256 = read_checksum(folder)
    if not (folder / WEIGHTS).exists():
        raise InputError(f'{folder} has no {WEIGHTS} to push.')
    files = [CARD, RECIPE, CONFIG, WEIGHTS, CHECKSUM]
    api, repo_id = HfApi(library_name='timm-pushpull'), f'{org}/{folder.resolve().name}'
    try:
        exists = api.repo_exists(repo_id)
        for info in api.get_paths_info(repo_id, WEIGHTS) if exists else []:
            if isinstance(info, RepoFile) and info.lfs is not None and info.lfs.sha256 != sha256:
                raise InputError(
                    f'{repo_id} holds other weights (SHA-256 {info.lfs.sha256}): give your model another tag, or '
                    'delete the repository by hand if nobody uses it.'
                )
        state = 'exists' if exists else f'new, {"private" if private else "public"}'
        sizes = ''.join(f'\n  {file:<26} {(folder / file).stat().st_size:>12,} bytes' for file in files)
        if not confirm(f'To {api.endpoint}/{repo_id} ({state}):{sizes}'):
            return None
        if not exists:
            api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=files, commit_message=f'Upload {folder.resolve().name}'
        )
        if revision is not None:
            tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}
            if tags.get(revision, commit.oid) != commit.oid:
                raise InputError(
                    f'{repo_id} has the git tag {revision} at another commit, {tags[revision]}: give another tag.'
                )
            if revision not in tags:
                api.create_tag(repo_id, tag=revision, revision=commit.oid)
    except InputError:
        raise
    except Exception as error:  # among others those of the HTTP library, which differs between huggingface_hub releases
        raise InputError(f'{repo_id} could not be pushed: {str(error).splitlines()[0]}') from error
    return commit.commit_url
