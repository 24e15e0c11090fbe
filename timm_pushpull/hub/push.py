"""Publishes a model's folder on the Hugging Face Hub."""

import os
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from .registry import CARD, CHECKSUM, CONFIG, RECIPE, WEIGHTS, read_checksum
from .check import check_folder

__all__ = ['push_folder']


def push_folder(
    folder: str | os.PathLike[str],
    org: str,
    confirm: Callable[[str], bool],
    private: bool = False,
    revision: str | None = None,
) -> str | None:
    """Upload a model's folder to its repository on the Hub, which is made if it does not exist.

    What has not changed is not uploaded again. The weights of a repository are not replaced: releases of this package
    that are installed know them by their checksum.

    Args:
        folder: The model's.
        org: Organisation or user.
        confirm: Asked with a description of what will be uploaded; False ends it there.
        private: Make a new repository private; one that exists stays as it is.
        revision: Name of a tag for the uploaded state.

    Returns:
        Address of the commit; None if it was not confirmed.

    Raises:
        ValueError: If the folder is not sound or has no weights, if the repository has other weights, if the tag is at
            another commit, or if the Hub refuses.
    """
    folder = Path(folder)
    check_folder(folder)
    sha256 = read_checksum(folder)
    files = [file for file in (CARD, RECIPE, CONFIG, WEIGHTS, CHECKSUM) if (folder / file).exists()]
    if WEIGHTS not in files:
        raise ValueError(f'{folder} has no {WEIGHTS} to push.')
    api, repo_id = HfApi(library_name='timm-pushpull'), f'{org}/{folder.resolve().name}'
    try:
        exists = api.repo_exists(repo_id)
        for there in api.get_paths_info(repo_id, WEIGHTS) if exists else []:
            if isinstance(there, RepoFile) and there.lfs is not None and there.lfs.sha256 != sha256:
                raise ValueError(
                    f'{repo_id} holds other weights (SHA-256 {there.lfs.sha256}): give yours another tag, or delete '
                    'the repository by hand if nobody uses it.'
                )
        state = 'there' if exists else f'new, {"private" if private else "public"}'
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
                raise ValueError(f'{repo_id} has the tag {revision} at another commit, {tags[revision]}: name another.')
            if revision not in tags:
                api.create_tag(repo_id, tag=revision, revision=commit.oid)
    except ValueError:
        raise
    except Exception as error:  # huggingface_hub passes on those of its HTTP library, which differs between releases
        raise ValueError(f'{repo_id} could not be pushed: {str(error).splitlines()[0]}') from error
    return commit.commit_url
