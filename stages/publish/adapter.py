"""An adapter on its way to a hub: weights, card, exports and evaluation, in one commit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open

from stages.adapters import GuidanceAdapter
from stages.adapters.export import SUFFIX
from stages.adapters.folder import CARD_FILE, CONFIG_FILE, FORMAT_KEY, WEIGHTS_FILE
from stages.base.places import public
from stages.errors import UserError
from stages.publish.places import TEXT, public_texts
from stages.publish.repository import MODEL, LocalFile, Repository, check_access, check_card

EXPORTS, EVALUATION = "exports", "evaluation"
OF_EVALUATION = (".html", ".json", ".png", ".yaml")  # not the parts that it was made from


def publish_adapter(
    folder: str | Path, repo_id: str, private: bool = False, branch: str | None = None
) -> tuple[Repository, list[str]]:
    """Upload an adapter; return the repository, and the names of what is there now.

    Raises:
        UserError: the folder holds no adapter, or the repository something else; nothing was uploaded.
        ChangedError: it changes meanwhile; nothing is committed.
        StorageError: the hub refused, or does not answer.
    """
    if not Path(folder).is_dir():
        raise UserError(f"adapter_dir={folder}: no such folder on this machine: name the folder of an adapter")
    folder = Path(folder)
    paths = {path.relative_to(folder).as_posix(): path for path in _paths(folder)}
    files = {name: LocalFile.of(path) for name, path in paths.items() if path.suffix not in TEXT}
    adapter = GuidanceAdapter.from_pretrained(folder)  # refuses what is none
    _check_headers(paths.values(), adapter.metadata.base.pretrained_model_name_or_path)
    texts = public_texts({name: path.read_bytes() for name, path in paths.items() if path.suffix in TEXT})
    check_access(repo_id, MODEL)
    check_card(texts.get(CARD_FILE, b""), repo_id, MODEL)
    repo = Repository(repo_id, MODEL, private, branch)
    if not _is_adapter(repo):
        repo.check_own("such an adapter")
    repo.announce()
    stale = {name for name in repo.names if name.startswith((f"{EXPORTS}/", f"{EVALUATION}/"))} - paths.keys()
    repo.commit(files, texts, f"adapter, {len(paths)} files", leave_out=stale)
    return repo, list(paths)


def _check_headers(paths: Iterable[Path], base: str) -> None:
    """Check that no exported file names the place of the base, as those of earlier versions do.

    Raises:
        UserError: names the file.
    """
    for path in paths:
        if public(base) == base or path.suffix != SUFFIX:
            continue
        with safe_open(path, framework="pt") as file:
            named = [text for text in (file.metadata() or {}).values() if base in text]
        if named:
            raise UserError(f"{path}: names {base}, a place on this machine: export it again; nothing was uploaded")


def _is_adapter(repo: Repository) -> bool:
    """Whether a repository holds an adapter, of any version; other libraries name their files alike."""
    if CONFIG_FILE not in repo.names:
        return False
    try:
        config = json.loads(repo.read(CONFIG_FILE))
    except ValueError:
        return False
    return isinstance(config, dict) and FORMAT_KEY in config


def _paths(folder: Path) -> list[Path]:
    own = [folder / name for name in (CARD_FILE, CONFIG_FILE, WEIGHTS_FILE)]
    evaluation = [path for path in (folder / EVALUATION).glob("*") if path.suffix in OF_EVALUATION]
    exports = [path for path in (folder / EXPORTS).rglob("*") if not path.name.startswith(".")]
    return [path for path in (*own, *sorted(evaluation), *sorted(exports)) if path.is_file()]
