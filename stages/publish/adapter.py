"""An adapter on its way to a hub: weights, card, exports and evaluation, in one commit."""

from __future__ import annotations

from pathlib import Path

from stages.adapters import GuidanceAdapter
from stages.adapters.folder import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from stages.errors import UserError
from stages.publish.repository import MODEL, LocalFile, Repository

EXPORTS, EVALUATION = "exports", "evaluation"
OF_EVALUATION = (".html", ".json", ".png", ".yaml")  # not the parts that it was made from


def publish_adapter(
    folder: str | Path, repo_id: str, private: bool = False, branch: str | None = None
) -> tuple[Repository, list[str]]:
    """Upload an adapter; return the repository, and the names of what is there now.

    Raises:
        UserError: the folder holds no adapter; nothing was uploaded.
        ChangedError: it changes meanwhile; nothing is committed.
        StorageError: the hub refused, or does not answer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"adapter_dir={folder}: no such folder on this machine: name the folder of an adapter")
    files = {path.relative_to(folder).as_posix(): LocalFile.of(path) for path in _paths(folder)}
    GuidanceAdapter.from_pretrained(folder)  # refuses what is none
    repo = Repository(repo_id, MODEL, private, branch)
    stale = {name for name in repo.names if name.startswith((f"{EXPORTS}/", f"{EVALUATION}/"))} - files.keys()
    repo.commit(files, {}, f"adapter, {len(files)} files", leave_out=stale)
    return repo, list(files)


def _paths(folder: Path) -> list[Path]:
    own = [folder / name for name in (CARD_FILE, CONFIG_FILE, WEIGHTS_FILE)]
    evaluation = [path for path in (folder / EVALUATION).glob("*") if path.suffix in OF_EVALUATION]
    exports = [path for path in (folder / EXPORTS).rglob("*") if not path.name.startswith(".")]
    return [path for path in (*own, *sorted(evaluation), *sorted(exports)) if path.is_file()]
