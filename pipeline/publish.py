"""Upload a dataset or an adapter to a Hugging Face hub, with its card. Give the same command again to go on.

python -m pipeline.publish data_dir=data/mnist_dit repo_id=OWNER/NAME
python -m pipeline.publish adapter_dir=runs/mnist_dit repo_id=OWNER/NAME

`HF_TOKEN` is a token that may write, and `HF_ENDPOINT` another hub than huggingface.co. With an adapter go its card,
the report in its folder `evaluation`, and what `pipeline.export` wrote into its folder `exports`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from omegaconf import MISSING

from pipeline.command import run
from stages.configuration.options import check_bounds, option
from stages.errors import UsageError
from stages.publish.adapter import publish_adapter
from stages.publish.dataset import publish_dataset

LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
BRANCH = re.compile(r"[\w][\w./-]*", re.ASCII)


@dataclass
class PublishConfig:
    repo_id: str = option(MISSING, "name of the repository on the hub, `OWNER/NAME`; made if it does not exist")
    data_dir: str | None = option(None, "folder of the dataset to upload")
    adapter_dir: str | None = option(None, "folder of the adapter to upload")
    private: bool = option(False, "make the repository private; by default everyone can read a new one")
    revision: str | None = option(None, "branch to upload to, made if it does not exist; by default `main`")
    license: str | None = option(
        None, "licence of the dataset, for its card's header, such as `cc-by-4.0`; by default the header names none"
    )


def main(config: PublishConfig) -> None:
    check_bounds(config)
    if (config.data_dir is None) == (config.adapter_dir is None):
        raise UsageError("give one of data_dir=FOLDER and adapter_dir=FOLDER")
    if "://" in config.repo_id:
        raise UsageError(f"repo_id={config.repo_id}: is an address: give OWNER/NAME alone")
    if "/" not in config.repo_id:
        raise UsageError(f"repo_id={config.repo_id}: has no owner: give OWNER/NAME")
    if config.revision is not None and not BRANCH.fullmatch(config.revision):
        raise UsageError(f"revision={config.revision}: not a name of a branch")
    if config.license is not None and not LICENCE.fullmatch(config.license):
        raise UsageError(f"license={config.license}: not as a hub spells it: such as mit or cc-by-4.0")
    if config.data_dir is not None:
        done = publish_dataset(config.data_dir, config.repo_id, config.private, config.revision, config.license)
        print(f"{done.address}: {done.shards} shards, of which {done.sent} were uploaded now")
        return
    if config.license is not None:
        raise UsageError("license: only for a dataset: an adapter's card names its base")
    repo, names = publish_adapter(str(config.adapter_dir), config.repo_id, config.private, config.revision)
    print(f"{repo.address}: {len(names)} files: {', '.join(names)}")
    print(f'loaded by GuidanceAdapter.from_pretrained("{repo.repo_id}")')


if __name__ == "__main__":
    run(PublishConfig, main, __doc__)
