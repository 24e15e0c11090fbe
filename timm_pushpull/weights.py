"""Finds the weights of a model in the cache of ``huggingface_hub`` or on the Hub, and verifies them.

``huggingface_hub`` compares the size of a download with that on the Hub, not the content. All weights that our networks
load from the Hub come through :func:`fetch_weights`, which compares the SHA-256 too.
"""

import hashlib
import os
import re
from typing import Any

__all__ = ['WEIGHTS', 'fetch_weights', 'file_sha256']

WEIGHTS, PICKLE = 'model.safetensors', 'pytorch_model.bin'


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Compute the SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_weights(
    hub_id: str, filename: str | None, sha256: str | None, cache_dir: str | os.PathLike[str] | None
) -> str:
    """Fetch weights from the cache, or from the Hub if the cache does not have them.

    Args:
        hub_id: Repository on the Hub, ``organisation/name`` or ``organisation/name@revision``.
        filename: File of the weights; None for ``model.safetensors`` or, where there is none, ``pytorch_model.bin``.
        sha256: Checksum of the weights. None: compare with the Hub's hash; detects damage, not a
            replaced upload.
        cache_dir: Cache folder; None for the default of ``huggingface_hub``.

    Returns:
        Path of the verified file in the cache.

    Raises:
        OSError: If the cache does not have the weights and the download fails; the message says why.
        RuntimeError: If the file is damaged, or holds other weights than ``sha256`` says.
    """
    from huggingface_hub import try_to_load_from_cache

    repo_id, _, version = hub_id.partition('@')
    revision, cache = version or None, None if cache_dir is None else os.fspath(cache_dir)
    if sha256 is not None:  # the file can be no other: the Hub need not be asked
        cached = try_to_load_from_cache(repo_id, WEIGHTS, cache_dir=cache, revision=revision)
        if isinstance(cached, str) and file_sha256(cached) == sha256:
            return cached
    names = [WEIGHTS, PICKLE] if filename is None else [filename]
    for name in names:
        try:
            path, etag = _download(repo_id, name, revision, cache)
        except _download_errors() as error:
            if name != names[-1] and _is_missing(error):
                continue
            reason = _reason(error, hub_id, names).rstrip('.')
            raise OSError(f'The weights of {hub_id} could not be fetched: {reason}.') from None
        return _verified(path, hub_id, sha256, etag)
    raise AssertionError('the last name returns or raises')


def _download(repo_id: str, name: str, revision: str | None, cache: str | None) -> tuple[str, str | None]:
    """Find a file in the cache, or download it.

    Returns:
        Its path, and its ETag on the Hub, None if the Hub did not tell.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    etag = None
    try:
        url = hf_hub_url(repo_id, name, revision=revision)
        etag = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT).etag
    except EntryNotFoundError:
        raise
    except _download_errors() as error:
        if isinstance(error, ConnectionError) or 'Connect' in type(error).__name__:  # of requests, or of httpx
            # The download would try to connect for most of a minute.
            cached = try_to_load_from_cache(repo_id, name, cache_dir=cache, revision=revision)
            if isinstance(cached, str):
                return cached, None
            raise LocalEntryNotFoundError(str(error)) from None
        # The download meets other errors again: it tries several times, and says more.
    return hf_hub_download(repo_id, name, revision=revision, cache_dir=cache, library_name='timm-pushpull'), etag


def _is_missing(error: BaseException) -> bool:
    """Tell whether a file is not in the repository or, without a connection, not in the cache."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    # The download gives other errors this type too, and says their cause.
    other = isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None
    return isinstance(error, EntryNotFoundError) and not other


def _download_errors() -> Any:
    """Return the errors of the disk, and of the HTTP library that ``huggingface_hub`` uses in this release."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *HfHubHTTPError.__bases__)


def _verified(path: str, hub_id: str, sha256: str | None, etag: str | None) -> str:
    # The file that path links to: if only the link were deleted, the next download would link to the same file.
    blob = os.path.realpath(path)
    # The Hub names large files by their SHA-256, and so does the cache where the system has links.
    named = next((name for name in (etag, os.path.basename(blob)) if re.fullmatch('[0-9a-f]{64}', name or '')), None)
    found = file_sha256(path)
    if sha256 not in (None, found) and found == named:
        raise RuntimeError(
            f'{hub_id} holds other weights (SHA-256 {found}) than this release of timm-pushpull knows ({sha256}). '
            f"Update timm-pushpull, or load them as timm.create_model('hf-hub:{hub_id}', pretrained=True)."
        )
    expected = sha256 or named
    if expected not in (None, found):
        raise RuntimeError(f'{blob} is damaged: its SHA-256 is {found}, not {expected}. Delete the file and try again.')
    return path


def _reason(error: BaseException, hub_id: str, names: list[str]) -> str:
    """Say in words why a download failed."""
    from huggingface_hub import constants, errors

    repo_id = hub_id.partition('@')[0]
    if isinstance(error, errors.GatedRepoError):
        return f'{repo_id} asks its users to log in and to accept its terms on the Hub'
    if isinstance(error, errors.RepositoryNotFoundError):
        return f'there is no public repository {repo_id} on the Hub; a private one needs a token that may read it'
    if isinstance(error, errors.RevisionNotFoundError):
        return f'{repo_id} has no such revision'
    if _is_missing(error):
        if not isinstance(error, errors.LocalEntryNotFoundError):
            return f'{repo_id} holds no {" and no ".join(names)}'
        cause = 'HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else f'{constants.ENDPOINT} cannot be reached'
        return f'{cause}, and the cache does not have them'
    reasons = dict.fromkeys(' '.join(str(each).split()) for each in (error, error.__cause__) if each is not None)
    return ' '.join(reasons)
