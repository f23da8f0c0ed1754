"""What a model hub tells of a model before anything of it is downloaded.

As much of huggingface.co's HTTP interface as that takes, with Python's own library: the list of a
revision's files with their sizes, and its config.json. roles/vllm_model fetches the files by the
same interface.
"""

import json
import os
import re
import ssl
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

from vllm_k80.errors import UserError

ENDPOINT = "https://huggingface.co"
_NETWORK = (URLError, ConnectionError, TimeoutError, ssl.SSLError, HTTPException)
_LARGEST = 1 << 24  # bytes of an answer: a configuration and a list of files are far below


class Told(NamedTuple):
    """A model's configuration, and its files' sizes in bytes by name."""

    config: dict[str, Any]
    sizes: dict[str, int]


def is_id(name: str) -> bool:
    """Whether this can be the name of a model on a hub: OWNER/NAME."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def ask(repository: str, revision: str, endpoint: str, timeout: float) -> Told:
    """Configuration and file sizes of a model.

    Args:
        repository: OWNER/NAME. revision: a commit, branch or tag.
        endpoint: address of the hub or of a mirror; empty: ``HF_ENDPOINT`` or huggingface.co.
            A token in ``HF_TOKEN`` is shown to it alone, not to where it redirects.
        timeout: seconds that the hub may be silent.

    Raises:
        UserError: the hub does not answer, or not with what a model has.
    """
    hub = (endpoint or os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
    where = f"{repository} at {revision[:12]}"
    named = quote(revision, safe="")
    try:
        listed = _json(f"{hub}/api/models/{repository}/revision/{named}?blobs=true", timeout)
        sizes = {entry["rfilename"]: int(entry.get("size") or 0) for entry in listed["siblings"]}
        if "config.json" not in sizes:
            ggufs = any(name.endswith(".gguf") for name in sizes)
            instead = "a GGUF file of it, once it is here" if ggufs else "another"
            raise UserError(f"{where} on {hub} has no config.json to judge it by. Name {instead}.")
        config = _json(f"{hub}/{repository}/resolve/{named}/config.json", timeout)
        if not isinstance(config, dict):
            raise TypeError
    except HTTPError as error:
        if error.code not in (401, 403, 404):
            raise UserError(
                f"{hub} does not tell of {where}: {error.code} {error.reason}. Try again later."
            ) from None
        raise UserError(
            f"{hub} shows no {where} ({error.code} {error.reason}); check the spelling of both, "
            f"and, if the model is gated or private, that HF_TOKEN may read it."
        ) from None
    except _NETWORK as error:
        cause = str(getattr(error, "reason", error)) or type(error).__name__
        raise UserError(
            f"{hub} cannot be reached: {cause}. Check the network, or name a mirror with "
            f"--endpoint."
        ) from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"{hub} does not tell files and configuration of {where} as a hub does; correct "
            f"--endpoint or HF_ENDPOINT."
        ) from None
    return Told(config, sizes)


def _json(url: str, timeout: float) -> Any:
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url.split('/api/')[0]} is no address of a hub: it begins with https://.")
    request = Request(url, headers={"Accept-Encoding": "identity"})
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with urlopen(request, timeout=timeout) as answer:
        return json.loads(answer.read(_LARGEST))
