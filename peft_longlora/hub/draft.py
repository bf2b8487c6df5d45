"""The draft of a push: what a repository holds beside an adapter, and what lies beside it on the disk.

A push writes its card on top of both, so that nothing on the Hub is worse than what lay on the disk or was there.
Called by push.py and folder.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from peft_longlora.hub.readme import README, merged_readmes, read_readme, without_results
from peft_longlora.hub.results import PLOTS, RESULTS

logger = logging.get_logger(__name__)


@dataclass
class Remote:
    """What a repository holds at one revision.

    Attributes:
        names: its files.
    """

    api: HfApi
    repo_id: str
    revision: str | None
    names: list[str] = field(default_factory=list)

    @classmethod
    def create(cls, api: HfApi, repo_id: str, revision: str | None, private: bool | None) -> Remote:
        """The repository, and the branch if it is none of a pull request; both are made if they are not there."""
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return cls(api, repo_id, revision, api.list_repo_files(repo_id, revision=revision))

    def beside(self, subfolder: str) -> list[str]:
        """Names in one of its folders of what a card is made from: README, results and pictures."""
        found = [name.removeprefix(subfolder) for name in self.names if name.startswith(subfolder)]
        return [name for name in found if name in (README, RESULTS) or (name.endswith(".png") and "/" not in name)]

    def download(self, subfolder: str, folder: Path) -> None:
        """Put what a card is made from into a folder."""
        with TemporaryDirectory() as place:
            for name in self.beside(subfolder):
                path = self.api.hf_hub_download(
                    self.repo_id, f"{subfolder}{name}", revision=self.revision, local_dir=place
                )
                folder.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(Path(path).read_bytes())

    def gone(self, subfolder: str, folder: Path) -> list[str]:
        """Its plots of earlier results that are no longer in the folder of the new ones."""
        names = self.beside(subfolder)
        return [f"{subfolder}{name}" for name in names if PLOTS.fullmatch(name) and not (folder / name).exists()]


def begin_draft(remote: Remote, subfolder: str, source: Path | None, folder: Path) -> None:
    """Put into a folder what the repository holds beside an adapter, with the README on the disk merged into its own.

    Args:
        subfolder: of the repository; "" or a name and "/".
        source: the adapter's folder on the disk; None if there is none.
    """
    remote.download(subfolder, folder)
    if source is None or not (source / README).is_file():
        return
    text = read_readme(source / README)
    if (source / RESULTS).is_file():
        text = without_results(text)  # the card gets them again if they are of the weights that are pushed
    folder.mkdir(parents=True, exist_ok=True)
    (folder / README).write_text(merged_readmes(text, read_readme(folder / README)), encoding="utf-8")


def complete_snapshot(api: HfApi, folder: Path) -> None:
    """Get what lies beside an adapter that was loaded from the Hub, because loading gets only config and weights."""
    if folder.parent.name != "snapshots" or not folder.parents[1].name.startswith("models--"):
        return
    repo_id = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    try:
        api.snapshot_download(
            repo_id, revision=folder.name, cache_dir=folder.parents[2], allow_patterns=[README, RESULTS, "*.png"]
        )
    except (HfHubHTTPError, OSError) as error:
        logger.warning(f"What lies beside {repo_id} on the Hub cannot be read ({error}), and is not pushed with it.")
