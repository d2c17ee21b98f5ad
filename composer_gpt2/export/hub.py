"""Uploads an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

__all__ = ["Hub"]


class Hub:
    """A repository of models that we may write to; what is wrong is known before any work.

    Args:
        name: ``OWNER/NAME``.
        private: Whether a repository that is not there yet is made for its owner's eyes.

    Raises:
        ValueError: The name is none.
        PermissionError: There is no token, or the hub refuses it.
        ConnectionError: The hub cannot be reached.
    """

    def __init__(self, name: str, *, private: bool) -> None:
        try:
            validate_repo_id(name)
        except ValueError as error:
            raise ValueError(
                f"a name on the hub must be OWNER/NAME, got {name!r}: {error}"
            ) from error
        if "/" not in name:
            raise ValueError(f"a name on the hub must be OWNER/NAME, got {name!r}; add the owner.")
        self._name, self._private, self._api = name, private, HfApi()
        try:
            self._api.whoami()
        except LocalTokenNotFoundError as error:
            raise PermissionError(
                "an upload needs a token of the Hugging Face hub with the right to write, got "
                "none; set HF_TOKEN, or run: huggingface-cli login"
            ) from error
        except HfHubHTTPError as error:
            raise _explained(error, self._api.endpoint) from error
        except OSError as error:  # requests' errors are OSErrors
            raise ConnectionError(
                f"the Hugging Face hub must be reachable at {self._api.endpoint}, got "
                f"{type(error).__name__}: {error}; check HF_ENDPOINT, HF_HUB_OFFLINE and the "
                "network."
            ) from error

    def upload(self, folder: Path) -> str:
        """Makes the repository if need be, uploads the folder in one commit, returns the address.

        Raises:
            PermissionError: The hub refuses.
            ConnectionError: The hub cannot be reached.
        """
        try:
            url = self._api.create_repo(self._name, private=self._private, exist_ok=True)
            self._api.upload_folder(
                repo_id=self._name, folder_path=folder, commit_message="Export of composer-gpt2"
            )
        except HfHubHTTPError as error:
            raise _explained(error, self._api.endpoint) from error
        return str(url)


def _explained(error: HfHubHTTPError, endpoint: str) -> OSError:
    status = None if error.response is None else error.response.status_code
    message = f"the Hugging Face hub at {endpoint} must accept the upload, got {error}"
    if status in (401, 403):
        return PermissionError(f"{message}; check the rights of the token in HF_TOKEN.")
    return ConnectionError(f"{message}; what was written is whole, try the upload again.")
