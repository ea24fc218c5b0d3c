"""Stage 1: prompts or classes -> shards. Run the teacher with guidance on Ray and record its trajectories.

python -m pipeline.generate --config configs/generate/mnist_dit.yaml output_dir=data/mnist_dit num_workers=2
"""

from __future__ import annotations

from pipeline.command import run
from stages.generate.config import GenerateConfig
from stages.generate.driver import Driver


def main(config: GenerateConfig) -> None:
    driver = Driver(config)
    root = driver.root
    if driver.finished:
        print(f"{root}: already finished, {len(driver.plan)} units; nothing to do")
        return
    from stages.generate.fleet import RayFleet  # importing ray takes seconds: only if there is work

    summary = driver.run(RayFleet(config))
    assert driver.info is not None
    size = driver.info.published[-1].counts.bytes
    print(
        f"{root}: {summary['trajectories']} trajectories, {summary['records']} records, {summary['units_committed']} shards, "
        f"{size / 1e6:.0f} MB, made in {summary['seconds']:.0f} s ({summary['records_per_second']:.0f} records/s)"
    )


if __name__ == "__main__":
    run(GenerateConfig, main, __doc__)
