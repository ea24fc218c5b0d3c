"""A dataset on its way to a hub: shards first, then all that makes a reader see them, in one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stages.errors import UserError
from stages.publish.dataset_card import card_of, header_of
from stages.publish.places import CONFIG_FILE, GENERATION_FILE, public_contents
from stages.publish.repository import DATASET, LocalFile, Repository, changed, check_access, check_card
from stages.records.commits import commit_names
from stages.records.dataset import how_to_finish
from stages.records.plans import DATASET_FILE, MANIFEST_FILE, read_info
from stages.records.verification import Survey, survey
from stages.storage.disk import DiskFolder
from stages.storage.folder import Folder, open_folder
from stages.storage.hub import HUB, HubFolder

OF_COMMANDS = (CONFIG_FILE, GENERATION_FILE, "preview.png")
SHARD = re.compile(r"shards/\d{5,}-[0-9a-f]{8}\.tar")


@dataclass(frozen=True)
class Published:
    """What was uploaded: the address of the commit, the number of shards, and how many of them were sent."""

    address: str
    shards: int
    sent: int


def publish_dataset(
    address: str, repo_id: str, private: bool = False, branch: str | None = None, license: str | None = None
) -> Published:
    """Upload a whole dataset with a card. An upload that was interrupted goes on with the shards that are missing.

    Until the last commit, a reader sees what the branch held before: nothing, or an earlier snapshot.

    Raises:
        UserError: the dataset is unfinished, growing or damaged, or the repository holds another one; nothing was
            uploaded.
        ChangedError: the folder changes meanwhile; the last commit is not made.
        StorageError: the hub refused, or does not answer.
    """
    root = open_folder(address)
    if not isinstance(root, DiskFolder):
        raise UserError(f"data_dir={address}: is not on this machine: name a local folder, such as a copy of it")
    before = _contents(root)
    found = survey(root, deep=False)
    _check_whole(found)
    check_access(repo_id, DATASET)  # before the shards are read, which takes long
    check_card(header_of(found, license).encode(), repo_id, DATASET)
    found = survey(root, deep=True)
    _check_whole(found)
    repo = Repository(repo_id, DATASET, private, branch)
    _check_same(repo, found)
    repo.announce()
    commits = found.commits.values()
    shards = {commit.shard: LocalFile(root.path / commit.shard, commit.sha256) for commit in commits}
    contents = public_contents(before, found.info) | card_of(found, repo.repo_id, license)
    sent = repo.upload(shards, "shards")
    if _contents(root) != before:
        raise changed(root)
    stale = {name for name in repo.names if name.startswith(("shards/", "commits/"))} - {*shards, *contents}
    repo.commit({}, contents, f"{found.info.published[-1].counts.trajectories} trajectories", leave_out=stale)
    return Published(f"{HUB}datasets/{repo.repo_id}@{repo.head}", len(shards), sent)


def _contents(root: Folder) -> dict[str, bytes]:
    """Read all files of a dataset but its shards."""
    names = [DATASET_FILE, MANIFEST_FILE, *OF_COMMANDS, *commit_names(root), *root.list("manifests")]
    read = {name: root.read(name) for name in names}
    return {name: content for name, content in read.items() if content is not None}


def _check_whole(found: Survey) -> None:
    """
    Raises:
        UserError: the dataset is unfinished, growing or damaged.
    """
    root, problems = found.root, found.problems
    if found.unfinished:
        there = found.unfinished[0]
        message = f"unfinished: expected {there['expected']}, found {there['found']}: {how_to_finish(root)}"
        raise UserError(f"{root}: {message}; nothing was uploaded")
    if problems:
        raise UserError(
            f"{root}: {len(problems)} problem(s); the first: {problems[0]['shard']}: found {problems[0]['found']}: "
            f"`python -m pipeline.verify {root.override('data_dir')}` lists them; nothing was uploaded"
        )
    if len(found.info.published) < len(found.info.plans):
        raise UserError(f"{root}: is growing: {how_to_finish(root)}; nothing was uploaded")


def _check_same(repo: Repository, found: Survey) -> None:
    """Refuse to replace another dataset, or more of this one.

    Raises:
        UserError: the repository holds one, or something else.
    """
    if DATASET_FILE not in repo.names:
        repo.check_own("such a dataset", left=SHARD)
    there = read_info(HubFolder(repo.repo_id, repo.head)) if DATASET_FILE in repo.names else None
    known = [plan.fingerprint for plan in found.info.published]
    if there is not None and there.published and there.published[-1].fingerprint not in known:
        raise UserError(f"{repo.address}: holds another dataset, or more of this one: take another repo_id")
