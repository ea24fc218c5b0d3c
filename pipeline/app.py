"""App: adapter -> a page on this machine, on which the pictures of every method follow a guidance slider.

python -m pipeline.app adapter_dir=runs/mnist_dit
"""

from __future__ import annotations

from contextlib import suppress

from pipeline.command import run
from stages.app.config import AppConfig
from stages.app.sampler import Sampler
from stages.base.loading import choose_device
from stages.configuration.options import check_bounds
from stages.errors import UserError
from stages.evaluate.comparisons import load_pair

NEEDED = ("gradio", "uvicorn", "fastapi")


def main(config: AppConfig) -> None:
    check_bounds(config)
    try:
        from stages.app import page, server
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise UserError(f"{error.name} is not installed: pip install '.[app]'") from error

    with server.listen(config.host, config.port) as listener:
        device = choose_device(config.device)
        pipe, adapter = load_pair(config.adapter_dir, config.pretrained_model_name_or_path, device, config.lora)
        sampler = Sampler(pipe, adapter, config.num_inference_steps)
        pictures = "a picture" if sampler.side == 1 else f"{sampler.side**2} pictures at once"
        title = f"{config.adapter_dir} on {pipe.name_or_path}: {pictures}, {config.num_inference_steps} steps, {device}"
        application = page.application(sampler, title)
        print(f"{server.address_of(listener)}: open it in a browser; Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve(application, listener)


if __name__ == "__main__":
    run(AppConfig, main, __doc__)
