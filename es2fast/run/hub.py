"""A model folder to the Hugging Face Hub, private unless said otherwise.

What cannot work is found out before anything is written or sent: the name, the token, the network,
and whether a repository of that name is public. `es2fast.yaml` stays here: it names local paths.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from es2fast.errors import UserError

T = TypeVar("T")
FIELD = "--push-to-hub"
LOCAL = ["es2fast.yaml"]
_REFUSALS = {
    401: "the token is not accepted; make a new one, and run `hf auth login`",
    403: "the token may not write there; give it write access, or choose another OWNER",
}


class HubTarget:
    """A repository that a model may be pushed to.

    Args:
        name: "owner/name", or "name" for the token's owner.
        public: everybody may read it.

    Raises:
        UserError: no such name can be, no token, no network, or the repository is there and public
            although `public` is not set.
    """

    def __init__(self, name: str, *, public: bool):
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise UserError(
                f"{FIELD}: {name!r} is no repository's name; write OWNER/NAME of letters, digits, "
                "'-', '_' and '.'"
            ) from None
        if get_token() is None:
            raise UserError(
                f"{FIELD}: there is no Hugging Face token; run `hf auth login`, or set HF_TOKEN to "
                "one that may write"
            )
        self._api = HfApi()
        self._public = public
        owner = _answered(self._api.whoami)["name"]
        self.name = name if "/" in name else f"{owner}/{name}"
        _answered(self._check_visibility)

    def push(self, folder: Path) -> str:
        """Makes the repository where there is none and uploads the folder's files in one commit.

        Args:
            folder: a complete model.

        Returns:
            the repository's address.

        Raises:
            UserError: the Hub refuses, or cannot be reached.
        """

        private = not self._public
        url = _answered(lambda: self._api.create_repo(self.name, private=private, exist_ok=True))
        _answered(
            lambda: self._api.upload_folder(
                repo_id=self.name,
                folder_path=folder,
                ignore_patterns=LOCAL,
                commit_message="Model hardened with es2fast",
            )
        )
        return str(url)

    def _check_visibility(self) -> None:
        try:
            found = self._api.model_info(self.name)
        except RepositoryNotFoundError:
            return
        if not found.private and not self._public:
            raise UserError(
                f"{FIELD}: {self.name} is there already and public; add --public to publish the "
                "model, or choose another name"
            )


def _answered(ask: Callable[[], T]) -> T:
    """What the Hub answers; UserError where it refuses or is not there. The message is made here,
    of nothing that was sent: the token is in the headers."""
    try:
        return ask()
    except OfflineModeIsEnabled:
        why = "HF_HUB_OFFLINE is set; unset it"
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = _REFUSALS.get(status, f"the Hub answered {status}; try again later")
    except (HTTPError, ConnectionError, TimeoutError) as error:
        name = type(error).__name__
        why = f"{constants.ENDPOINT} cannot be reached ({name}); check the network"
    raise UserError(f"{FIELD}: {why}")
