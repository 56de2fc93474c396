"""Train a transformer that generates the codes of a frozen tokenizer one after the other.

accelerate launch autoregressive/train.py                            # B on what the default tokenizer run left
accelerate launch autoregressive/train.py --config configs/imagenet128/ar-xl.yaml --tokenizer runs/nsvq/tokenizer
The same command goes on from the newest checkpoint; the finished pipeline is in <out>/pipeline.
"""

import sys
from pathlib import Path

from nsvq.autoregressive.config import TrainConfig
from nsvq.autoregressive.trainer import AutoregressiveTrainer
from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.generator import check_image_size
from nsvq.common.run import make_accelerator
from nsvq.common.training import train
from nsvq.data.understood import announce
from nsvq.eval.monitor import monitor
from nsvq.pipelines.autoregressive import save_pipeline
from nsvq.tokenizer import codebook
from nsvq.tokenizer.encode import open_cache
from nsvq.tokenizer.pretrained import Tokenizer, find_tokenizer

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "imagenet128" / "ar-b.yaml"


def main() -> None:
    config = configs.parse(TrainConfig, sys.argv[1:], default_file=DEFAULT_CONFIG)
    source = find_tokenizer(config.tokenizer)
    accelerator = make_accelerator(config.run, config.out, may_shard=True)
    codebook.prepare(accelerator.device)
    announce(config.data, accelerator)
    tokenizer = Tokenizer.from_pretrained(source).to(accelerator.device)
    check_image_size(tokenizer, config.data)
    folder, workers = config.cache or config.out / "codes", config.run.workers
    cache = open_cache(
        folder,
        tokenizer,
        config.data,
        accelerator,
        workers=workers,
        limit=config.cache_images,
        crops=config.cache_crops,
        kind="codes",
        verify=config.cache_verify,
    )
    held_out = open_cache(
        folder / f"test-{config.held_out.images or 'all'}",
        tokenizer,
        config.data.model_copy(update={"flip": False}),
        accelerator,
        workers=workers,
        limit=config.held_out.images,
        kind="codes",
        split="test",
        verify=config.cache_verify,
    )
    distance = monitor(config.sampling, config.data, accelerator, workers, tokens=True)
    train(AutoregressiveTrainer(config, accelerator, tokenizer, cache, held_out, save, distance))


def save(folder: Path, trainer: AutoregressiveTrainer) -> None:
    """The pipeline of the weights in `trainer.drawn`, and how it was trained."""
    objective = f"cross-entropy of the next code; the learning rate falls to {trainer.config.schedule.final:g} of it"
    about = trainer.about(objective, "transformers")
    save_pipeline(folder, trainer.drawn, trainer.tokenizer.model, trainer.names, about)


if __name__ == "__main__":
    launch.run(main)
