"""Turns what goes wrong with the Hub into one clear sentence each."""

import huggingface_hub
from huggingface_hub import constants, errors

from .._errors import SourceError


INDEX = "model_index.json"
"""The file at the root of every model in diffusers layout."""

NETWORK_ERRORS = (
    errors.HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    errors.OfflineModeIsEnabled,
)
"""The errors of the library's HTTP client when there is no answer. The client depends on the
library's version."""


def explain(
    error: Exception, repository: str, revision: str | None, file: str, *, offline: bool
) -> Exception:
    """Turns an exception of `huggingface_hub` into one clear sentence, or returns it as it is.

    The Hub answers 401 to an anonymous and 403 to a known user; a gated repository has the error
    code `GatedRepo`, and only the text says what a token lacks.
    """
    page = f"https://huggingface.co/{repository}"
    tokens = "https://huggingface.co/settings/tokens"
    cause = error.__cause__
    if isinstance(error, errors.LocalEntryNotFoundError):
        if isinstance(cause, errors.HfHubHTTPError):
            return explain(cause, repository, revision, file, offline=offline)
        if offline or isinstance(cause, errors.OfflineModeIsEnabled):
            return SourceError(
                f"{file} of {repository}{_at(revision)} is not in the local cache, and the Hub is "
                "not asked because of offline mode (HF_HUB_OFFLINE); download it once while online."
            )
        return SourceError(
            f"The Hub cannot be reached at {constants.ENDPOINT} and {file} of {repository}"
            f"{_at(revision)} is not in the local cache; check the network, or give a local folder."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(f"{repository} has no branch, tag or commit {revision!r}; see {page}.")
    if isinstance(error, errors.EntryNotFoundError):
        what = "which every model in the diffusers layout has" if file == INDEX else f"see {page}"
        return SourceError(f"{repository}{_at(revision)} has no {file}, {what}.")
    if isinstance(error, errors.HFValidationError):
        return SourceError(f"{repository!r} is not a name that a Hub repository can have.")
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error, repository, page, tokens)
    if isinstance(error, NETWORK_ERRORS):
        return SourceError(
            f"The Hub cannot be reached at {constants.ENDPOINT} ({error}); check the network."
        )
    if isinstance(error, OSError):
        return SourceError(
            f"{file} of {repository} cannot be stored in {constants.HF_HUB_CACHE}: "
            f"{error.strerror or error}."
        )
    return error


def _explain_status(
    error: errors.HfHubHTTPError, repository: str, page: str, tokens: str
) -> SourceError:
    status = error.response.status_code
    said = f"{error.response.headers.get('X-Error-Message', '')} {error}".lower()
    token = huggingface_hub.get_token() is not None
    if "expired" in said:
        return SourceError(f"Your Hub token has expired; make a new one at {tokens} and log in.")
    if "invalid credentials" in said or ("invalid username or password" in said and token):
        return SourceError(f"The Hub does not know your token; make a new one at {tokens}.")
    if "fine-grained" in said:
        return SourceError(
            f"{repository} is gated and your fine-grained token may not read gated repositories; "
            f"enable that for the token at {tokens}."
        )
    if isinstance(error, errors.GatedRepoError):
        if status == 401 or not token:
            return SourceError(
                f"{repository} is gated and you are not logged in; accept its licence at {page}, "
                "then run `hf auth login` or set HF_TOKEN."
            )
        return SourceError(
            f"{repository} is gated and your account has no access to it; accept its licence at "
            f"{page} with the account that your token belongs to."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "the rights of your token" if token else "log in with `hf auth login`"
        return SourceError(
            f"There is neither a folder nor a Hub repository {repository}; check the spelling, or "
            f"if it is private, {private}."
        )
    if isinstance(error, errors.DisabledRepoError):
        return SourceError(f"{repository} has been disabled on the Hub; see {page}.")
    if status == 429:
        return SourceError("The Hub refuses more requests for now; wait some minutes, or log in.")
    if status >= 500:
        return SourceError(f"The Hub fails with status {status}; try again later.")
    text = error.response.headers.get("X-Error-Message") or f"status {status}"
    return SourceError(f"The Hub refuses {repository}: {text.rstrip('.')}; see {page}.")


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at revision {revision}"
