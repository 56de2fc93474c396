"""Train an image tokenizer with NSVQ's three phases, or any other quantizer under the same trainer.

accelerate launch tokenizer/train.py                                                # NSVQ on ImageNet-128
accelerate launch tokenizer/train.py --config configs/imagenet128/simvq.yaml --out runs/simvq --run.batch_size 256
accelerate launch --num_processes 4 --mixed_precision bf16 tokenizer/train.py --config FILE
The same command goes on from the newest checkpoint; the finished tokenizer is in <out>/tokenizer.
"""

import sys
from pathlib import Path

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.run import make_accelerator
from nsvq.common.training import train
from nsvq.eval.monitor import reconstruction_monitor
from nsvq.tokenizer import codebook
from nsvq.tokenizer.config import TrainConfig
from nsvq.tokenizer.trainer import TokenizerTrainer

DEFAULT_CONFIG = Path(__file__).parent.parent / "configs" / "imagenet128" / "nsvq.yaml"


def main() -> None:
    config = configs.parse(TrainConfig, sys.argv[1:], default_file=DEFAULT_CONFIG)
    accelerator = make_accelerator(config.run, config.out)
    codebook.prepare(accelerator.device)
    train(TokenizerTrainer(config, accelerator, reconstruction_monitor(config, accelerator)))


if __name__ == "__main__":
    launch.run(main)
