"""Put a finished folder on the Hugging Face hub; only when asked."""

from __future__ import annotations

from pathlib import Path


def check_push(repository: str) -> None:
    """Refuse, before any work, a push that the hub would refuse after it.

    Raises:
        ValueError: huggingface_hub is not installed, it does not take the name, or has no token.
    """
    try:
        from huggingface_hub import get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise ValueError(
            "--push needs huggingface_hub; install it with: pip install huggingface_hub"
        ) from None
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"--push {repository}: {error}") from None
    if get_token() is None:
        raise ValueError(
            f"--push {repository}: no token for the Hugging Face hub; run: hf auth login, or set "
            "HF_TOKEN"
        )


def push(folder: Path, repository: str) -> str:
    """Upload a folder to a model repository, which is made if there is none; a new one is private.

    Args:
        repository: owner/name, or a name of the user's own; it has passed `check_push`.

    Returns:
        Its address.

    Raises:
        OSError: the hub refuses, or cannot be reached; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=str(folder))
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{folder} is finished, but {repository} could not be pushed ({reason})"
        ) from None
    return str(address)
