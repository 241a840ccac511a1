"""Put a finished folder on the Hugging Face hub; only when asked."""

from __future__ import annotations

from pathlib import Path


def push(folder: Path, repository: str) -> str:
    """Upload a folder to a model repository, which is made if there is none; a new one is private.

    Returns:
        Its address.

    Raises:
        ValueError: huggingface_hub is not installed.
        OSError: the hub refuses, or cannot be reached; the folder stays as it is.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError:
        raise ValueError(
            "--push needs huggingface_hub; install it with: pip install huggingface_hub"
        ) from None
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"{folder} is finished, but {repository} could not be pushed ({reason})"
        ) from None
    return str(address)
