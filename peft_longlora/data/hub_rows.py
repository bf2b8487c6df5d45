"""Rows of a dataset on the Hub, streamed. Imports `datasets` only then."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from huggingface_hub import dataset_info
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

NAME_ON_HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


def hub_rows(source: str, split: str, config: str | None) -> Iterator[tuple[str, Any]]:
    """(place, row) for every row of a dataset, one by one.

    Args:
        source: the dataset's id. split, config: of it.

    Raises: FileNotFoundError: there is none, or the Hub is not reached. ValueError: it cannot be read.
    """
    from datasets import load_dataset

    _ask_hub(source)
    try:
        rows = load_dataset(source, config, split=split, streaming=True)
    except OSError as error:
        raise FileNotFoundError(f"{source}: no file or folder here, and not read from the Hub: {error}") from error
    except (ValueError, RuntimeError) as error:  # no such split or configuration, or a script, which is never run
        raise ValueError(f"{source}: not read from the Hub: {error}") from error
    rows, number = iter(rows), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # of a damaged file, of the network, or of `datasets` itself
            if isinstance(error, ImportError | MemoryError):
                raise
            raise ValueError(
                f"{source} ({split}), behind record {number}: not read from the Hub: {type(error).__name__}: {error}"
            ) from error
        number += 1
        yield f"{source} ({split}), record {number}", row


def _ask_hub(source: str) -> None:
    """Refuse a dataset that is not there, or a Hub that is not reached; `datasets` would ask for half a minute.

    Raises: FileNotFoundError.
    """
    try:
        dataset_info(source, timeout=10)
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{source}: no file or folder here, and no such dataset on the Hub. Check the name; if it is private or "
            f"gated, log in with `hf auth login` or set HF_TOKEN."
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled):  # it is there and does not answer now, or its cache is asked
        return
    except Exception as error:  # of the library that the Hub's client speaks through, which is not always the same
        raise FileNotFoundError(
            f"{source}: no file or folder here, and the Hub is not reached to look for it there ({error}). Check the "
            f"name, or the connection."
        ) from error
