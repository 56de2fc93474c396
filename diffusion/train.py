"""Train a DiT, or a U-Net, by rectified flow or as a DDPM, in the latent space of a frozen tokenizer.

accelerate launch diffusion/train.py                                    # DiT-B on what the default tokenizer run left
accelerate launch diffusion/train.py --config configs/imagenet128/dit-xl.yaml --tokenizer runs/nsvq/tokenizer
accelerate launch --num_processes 4 --mixed_precision bf16 diffusion/train.py --config FILE --tokenizer DIR
The same command goes on from the newest checkpoint; the finished pipeline is in <out>/pipeline.
"""

import sys
from pathlib import Path

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.generator import check_image_size
from nsvq.common.run import make_accelerator
from nsvq.common.training import train
from nsvq.data.understood import announce
from nsvq.diffusion.config import TrainConfig
from nsvq.diffusion.trainer import DiffusionTrainer
from nsvq.errors import UsageError
from nsvq.eval.monitor import monitor
from nsvq.pipelines.export import save_pipeline, to_stock
from nsvq.tokenizer import codebook
from nsvq.tokenizer.encode import open_cache
from nsvq.tokenizer.pretrained import find_tokenizer, open_tokenizer

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "imagenet128" / "dit-b.yaml"


def main() -> None:
    config = configs.parse(TrainConfig, sys.argv[1:], default_file=DEFAULT_CONFIG)
    folder = find_tokenizer(config.tokenizer)
    accelerator = make_accelerator(config.run, config.out, may_shard=True)
    codebook.prepare(accelerator.device)
    classes = announce(config.data, accelerator).classes
    if config.model.conditional and len(classes) < 2:
        what = f"one class, {classes[0]!r}" if classes else "no labels"
        about = "and the model is to learn classes: see the lines above, or set --model.conditional false"
        raise UsageError(f"{config.data.source} has {what}, {about}")
    tokenizer = open_tokenizer(folder).to(accelerator.device)
    check_image_size(tokenizer, config.data)
    cache = open_cache(
        config.cache or config.out / "latents",
        tokenizer,
        config.data,
        accelerator,
        workers=config.run.workers,
        limit=config.cache_images,
        crops=config.cache_crops,
        kind=config.latents,
        verify=config.cache_verify,
    )
    distance = monitor(config.sampling, config.data, accelerator, config.run.workers, tokens=False)
    train(DiffusionTrainer(config, accelerator, tokenizer, cache, save, distance))


def save(folder: Path, trainer: DiffusionTrainer) -> None:
    """The stock pipeline of the weights in `trainer.drawn`, and how it was trained."""
    vae, scheduler = trainer.tokenizer.model, trainer.objective.scheduler()
    about = trainer.about(trainer.objective.description)
    save_pipeline(folder, to_stock(trainer.drawn), vae, scheduler, trainer.names, about)


if __name__ == "__main__":
    launch.run(main)
