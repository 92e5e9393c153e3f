"""Where a model or a tokenizer comes from: a folder, a run's folder, or the hub."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import HfHubHTTPError, RepositoryNotFoundError, validate_repo_id

from rlhf_trainer.config import ConfigError

# A folder with one of these holds a model or a tokenizer itself.
MARKS = ("config.json", "tokenizer_config.json", "tokenizer.json")
MODEL = "model"  # the folder in a run's that holds what the run ends with


def locate(option: str, spec: str) -> tuple[str, dict[str, Any]]:
    """What from_pretrained takes for `spec`: a folder or hub name, and options beside it.

    Raises ConfigError where neither a folder nor the hub, as far as it is reached, has one.
    """
    folder = Path(spec)
    if folder.is_dir():
        return str(_in_run(option, folder)), {}
    try:
        validate_repo_id(spec)
    except ValueError as error:
        raise ConfigError(
            f"{option}: expected a folder or a hub name, got {spec}: there is no such folder"
        ) from error
    return spec, _hub_options(option, spec)


def _in_run(option: str, folder: Path) -> Path:
    """The folder, or model/ in it where it is a run's."""
    if any((folder / mark).exists() for mark in MARKS):
        return folder
    inner = folder / MODEL
    if any((inner / mark).exists() for mark in MARKS):
        _say_once(f"{option}: {folder} is the folder of a run: taking {inner}")
        return inner
    if (folder / "metrics.jsonl").exists():
        raise ConfigError(
            f"{option}: expected the folder of a finished run, got {folder}, which has no {MODEL}/ "
            "yet: finish that run with --resume"
        )
    return folder


def _hub_options(option: str, spec: str) -> dict[str, Any]:
    """Those that keep to the hub's cache where the hub does not answer.

    One request without retries finds out: from_pretrained takes a minute of them for each file.
    """
    try:
        get_hf_file_metadata(hf_hub_url(spec, MARKS[0]), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{option}: expected a folder or a hub name, got {spec}: there is no such folder, and "
            "the hub has none of that name, or keeps it private"
        ) from error
    except HfHubHTTPError:  # an answer all the same; what it means is from_pretrained's to say
        return {}
    except Exception as error:  # of whichever HTTP client this version of the hub's library has
        if any(isinstance(try_to_load_from_cache(spec, mark), str) for mark in MARKS):
            _say_once(f"{option}: {constants.ENDPOINT} is out of reach: taking {spec} as cached")
            return {"local_files_only": True}
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{option}: expected a folder or a hub name, got {spec}: there is no such folder, none "
            f"in the hub's cache, and {constants.ENDPOINT} is out of reach ({reason})"
        ) from error
    return {}


@functools.cache
def _say_once(line: str) -> None:
    """Print what several loads of one model would repeat."""
    print(line)
