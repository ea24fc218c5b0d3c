"""One evaluation: workers make its parts, in this process or elsewhere, and the rows are computed from the parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import yaml
from torch import Tensor

from stages.adapters import GuidanceAdapter
from stages.base.denoiser import fingerprint
from stages.base.loading import check_name, choose_device, diffusers_class
from stages.configuration.options import check_bounds, to_yaml
from stages.errors import UserError
from stages.evaluate.comparisons import Setting, measured_scales, recorded_class, settings
from stages.evaluate.conditions import read_conditions
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.effective_scale import effective_scale
from stages.evaluate.methods import CFG, NONE
from stages.evaluate.metrics import summary
from stages.evaluate.parts import Parts, Result
from stages.evaluate.reference import Reference
from stages.evaluate.worker import DISTANCES, ERROR, Facts, Worker, number_of_parts
from stages.progress import progress
from stages.storage.files import check_folder, whole_file

# What another command leaves in its folder.
OTHERS = {
    "adapter_config.json": "an adapter",
    "checkpoints": "a training run",
    "dataset.json": "a dataset",
    "commits": "a dataset",
    "claims.json": "a study",
}
ROUNDING = 1e-9  # a mean squared distance between latents, whose deviation is about 1, that rounding explains
Begin = Callable[[Facts], list[int]]
Makers = Callable[["Evaluation", Begin], Iterator[int]]


def evaluate_in_process(evaluation: Evaluation, begin: Begin) -> Iterator[int]:
    """Make the missing parts in this process; yield the number of images of each finished part."""
    worker = evaluation.new_worker()
    for part in begin(worker.load()):
        yield worker.make(part)


class Evaluation:
    """Compares one pass, by one adapter or several, with CFG and with no guidance.

    Attributes:
        folder: the output folder.
        adapters: the adapters' folders by name; the name is the folder's, or the path if two folders share a name.
        settings: the settings to compare, in the order of the rows.
        rows: one per setting, as in `evaluation.json`, after `run`.
        metadata: the other content of `evaluation.json`.
        shown: the first images of each setting, bytes `[10, c, h, w]`, from the same noise.

    Raises:
        UserError: the configuration is invalid.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        check_bounds(config)
        self.config = config
        self.adapters = adapter_names(config.adapter_dir)
        if config.output_dir is None and len(self.adapters) > 1:
            raise UserError("output_dir: not given: with several adapters, name the folder of the evaluation")
        folder = next(iter(self.adapters.values()))
        if config.output_dir is None and "://" in folder:
            raise UserError(f"output_dir: not given: {folder} is in a bucket: name a local folder for the evaluation")
        if config.output_dir is None and not Path(folder).is_dir():
            raise UserError(
                f"adapter_dir={folder}: no such folder: name an adapter's folder, or a hub id and an output_dir"
            )
        self.folder = Path(config.output_dir or Path(folder) / "evaluation")
        check_own_folder(self.folder)
        self.settings = settings(config.guidance_scale, config.methods, list(self.adapters))
        if config.scheduler is not None:
            diffusers_class(config.scheduler, "scheduler")
        first = GuidanceAdapter.from_pretrained(folder)
        if (kind := recorded_class(first.metadata)) is not None:  # else the workers find out
            read_conditions(config, kind, first)
        self.reference: Reference | None = None
        if config.reference is not None:
            device = choose_device(config.device)
            self.reference = Reference(config.reference, device, config.features, config.features_model)
        self.rows: list[dict[str, Any]] = []
        self.metadata: dict[str, Any] = {}
        self.shown: dict[Setting, Tensor] = {}

    def new_worker(self) -> Worker:
        return Worker(self.config, self.adapters, self.folder)

    def run(self, makers: Makers = evaluate_in_process) -> list[dict[str, Any]]:
        """Make the parts that are missing, and return the rows."""
        check_folder(self.folder)
        if self.reference is not None:  # first, to report unreadable images before hours of sampling
            cache_features(self.reference, self.folder / "reference_features.safetensors")
        with progress(self.config.num_samples, "evaluate", "images") as bar:

            def begin(facts: Facts) -> list[int]:
                self.parts = Parts(self.folder, facts.identity, number_of_parts(self.config))
                self.metadata = self._metadata(facts)
                missing = self._missing()
                bar.update(self.config.num_samples - sum(self._size(part) for part in missing))
                return missing

            for images in makers(self, begin):
                bar.update(images)
        self.rows = self._rows()
        return self.rows

    def _missing(self) -> list[int]:
        """
        Raises:
            UserError: the folder holds parts of another evaluation; names what differs, if that one was finished.
        """
        try:
            return self.parts.missing()
        except UserError as error:
            if others := other_options(self.folder / "config.yaml", self.config):
                raise UserError(f"{error} (its {', '.join(others)})") from error
            raise

    def _size(self, part: int) -> int:
        return min(self.config.batch_size, self.config.num_samples - part * self.config.batch_size)

    def _metadata(self, facts: Facts) -> dict[str, Any]:
        described = [adapter_info(name, folder, facts.parameters) for name, folder in self.adapters.items()]
        bases = [adapter.pop("base") for adapter in described]
        config, alone = self.config, described[0] if len(described) == 1 else {}
        return {
            "base": config.pretrained_model_name_or_path or bases[0],
            **alone,
            "num_samples": config.num_samples,
            "num_inference_steps": config.num_inference_steps,
            **({} if config.size is None else {"size": config.size}),
            "device": facts.device,
            "adapters": described,
        }

    def _rows(self) -> list[dict[str, Any]]:
        total, timesteps = self.config.num_samples, self.parts.timesteps()
        adapters = {info["adapter"]: info for info in self.metadata["adapters"]}
        closeness = self._distances_to_cfg()
        rows = []
        for number, setting in enumerate(self.settings):
            found = self.parts.result(number)
            self.shown[setting] = found.shown
            if setting.method == NONE:
                plain = found
            adapter = adapters.get(setting.adapter, {})
            rows.append(
                {
                    "method": setting.method,
                    "guidance_scale": setting.guidance_scale,
                    **{key: adapter.get(key) for key in ("adapter", "variant", "seed")},
                    **summary(image_measurements(found), self.reference),
                    **closeness[setting],
                    "denoiser_evaluations": found.denoiser_evaluations / total,
                    "fused": found.fused,
                    "seconds_per_image": found.seconds / total,
                    "time_relative_to_none": found.seconds / plain.seconds,
                    "error_by_timestep": errors_by_timestep(found, timesteps),
                }
            )
        return rows

    def _distances_to_cfg(self) -> dict[Setting, dict[str, float | None]]:
        """The gap to CFG at its own scale that each setting closes, and its effective scale."""
        measured = measured_scales(self.settings)
        scales = sorted(measured)
        means = [self.parts.values(number, DISTANCES).mean(dim=0).tolist() for number in range(len(self.settings))]
        distances = dict(zip(self.settings, means, strict=True))
        between = [distances[measured[scale]][i + 1] for i, scale in enumerate(scales[:-1])]
        gaps = dict(zip(scales, distances[measured[1.0]], strict=True))
        return {
            setting: {
                "gap_closed": gap_closed(setting, dict(zip(scales, found, strict=True)), gaps),
                "effective_scale": effective_scale(found, between, scales),
            }
            for setting, found in distances.items()
        }


def check_own_folder(folder: Path) -> None:
    """
    Raises:
        UserError: the folder is another command's, whose files this one would replace.
    """
    for name, kind in OTHERS.items():
        if (folder / name).exists():
            raise UserError(f"output_dir={folder}: holds {kind}: name a folder of the evaluation's own")


def other_options(path: Path, config: EvaluateConfig) -> list[str]:
    """The options of a saved configuration that differ from a configuration, with their values there."""
    if not path.is_file():
        return []
    there, here = yaml.safe_load(path.read_bytes()), yaml.safe_load(to_yaml(config))
    elsewhere = ("output_dir", "device")
    return [f"{key} is {value}" for key, value in there.items() if key not in elsewhere and value != here.get(key)]


def adapter_names(adapter_dir: Any) -> dict[str, str]:
    """The adapters' folders by name."""
    folders = [adapter_dir] if isinstance(adapter_dir, str) else adapter_dir
    if not isinstance(folders, list) or not folders or not all(isinstance(folder, str) for folder in folders):
        raise UserError(f"adapter_dir={adapter_dir}: name the folder of an adapter, or a list of folders")
    for folder in folders:
        check_name(folder)
    names = [Path(folder).name for folder in folders]
    unique = names if len(set(names)) == len(names) else folders
    places = [str(Path(folder).resolve()) if Path(folder).exists() else folder.rstrip("/") for folder in folders]
    if twice := [place for place, times in Counter(places).items() if times > 1]:
        raise UserError(f"adapter_dir: {folders[places.index(twice[0])]} is given twice: name each adapter once")
    return dict(zip(unique, folders, strict=True))


def adapter_info(name: str, folder: str, parameters_of_denoiser: int) -> dict[str, Any]:
    """An adapter's entry in `evaluation.json`; its seed comes from `config.yaml` in its folder, if there is one."""
    adapter = GuidanceAdapter.from_pretrained(folder)
    parameters = sum(p.numel() for p in adapter.parameters())
    config = Path(folder) / "config.yaml"
    trained = yaml.safe_load(config.read_bytes()) if config.is_file() else {}
    return {
        "base": adapter.metadata.base.pretrained_model_name_or_path,
        "adapter": name,
        "variant": adapter.variant,
        "seed": trained.get("seed"),
        "parameters": parameters,
        "share": parameters / parameters_of_denoiser,
        "adapter_fingerprint": fingerprint(adapter),
        "guidance_gain": adapter.metadata.guidance_gain,
    }


def cache_features(reference: Reference, path: Path) -> None:
    """Read the features of encoded images from a cache file, or compute and cache them."""
    if isinstance(reference.images, Tensor):
        return
    try:
        with safetensors.safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("fingerprint") == reference.fingerprint:
                reference.features = file.get_tensor("features")
                return
    except (OSError, safetensors.SafetensorError):
        pass
    content = safetensors.torch.save({"features": reference.features}, {"fingerprint": reference.fingerprint})
    with whole_file(path) as kept:
        kept.write(content)


def image_measurements(found: Result) -> dict[str, Tensor]:
    """The judges' measurements of each image."""
    return {name: v for name, v in found.values.items() if name != DISTANCES and not name.startswith(ERROR)}


def gap_closed(setting: Setting, distances: dict[float, float], gaps: dict[float, float]) -> float | None:
    """The share of the gap between no guidance and CFG, in the final latents, that a setting closes; None without one."""
    if setting.method in (NONE, CFG):
        return float(setting.method == CFG)
    gap = gaps[setting.guidance_scale]
    return None if gap < ROUNDING else 1 - distances[setting.guidance_scale] / gap


def errors_by_timestep(found: Result, timesteps: list[float]) -> list[dict[str, Any]]:
    """The mean squared distance of the latents to CFG's at each timestep, one curve per CFG scale."""
    curves = {
        float(n.removeprefix(ERROR)): v.mean(dim=0).tolist() for n, v in found.values.items() if n.startswith(ERROR)
    }
    return [{"guidance_scale": scale, "timestep": timesteps, "error": errors} for scale, errors in curves.items()]
