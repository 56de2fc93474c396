"""Positions of the autoregressive stage: bits an image on held-out codes, with stock rotary positions and with others.

python benchmarks/positions.py --tokenizer DIR --data DIR
python benchmarks/positions.py --tokenizer DIR --data DIR --ways rotary rotary-2d --steps 250
rotary: stock, one number a place. rotary-2d: half of each head's dimensions turn by the row of a code, half by its
column. rotary+table: stock, and a learned vector a place on the embeddings. table: these vectors alone.
The config is that of the studies (configs/evidence/ar64.yaml); seeds, batches and steps are equal. Runs that --steps
ended go on with a larger number; the table has what they have done. Seconds are those of the least disturbed steps.
"""

import sys
from pathlib import Path
from typing import Literal

import torch
from measure import machine, metrics_of
from pydantic import Field
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from nsvq.autoregressive.config import TrainConfig
from nsvq.autoregressive.trainer import AutoregressiveTrainer
from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.run import make_accelerator
from nsvq.common.training import train
from nsvq.tokenizer import codebook
from nsvq.tokenizer.encode import open_cache
from nsvq.tokenizer.pretrained import Tokenizer, find_tokenizer

Way = Literal["rotary", "rotary-2d", "rotary+table", "table"]
CONFIG = Path(__file__).parents[1] / "configs" / "evidence" / "ar64.yaml"


class PositionsConfig(TrainConfig):
    """Train one transformer for each kind of positions, and compare bits an image on held-out codes."""

    out: Path = Field(Path("runs/positions"), description="Folder of the runs; holds the codes, too.")
    ways: list[Way] = Field(["rotary", "rotary-2d", "rotary+table", "table"], description="Kinds of positions.")
    steps: int | None = Field(None, ge=1, description="Stop there; null is schedule.steps, where the rate ends.")


class Rotary2D(nn.Module):
    """2-D rotary positions (axial, as LlamaGen's, arXiv 2406.06525) in place of `LlamaRotaryEmbedding`.

    forward(x, places [B, N]) -> cos and sin [B, N, size], of x's type. Place 0 is the class, in row -1; then come the
    codes row by row. `size` of a head, a multiple of 4. Llama turns dimension i with i + size / 2: the first half of
    these pairs turns by the row, the second by the column.
    """

    def __init__(self, size: int, columns: int, theta: float = 10_000.0):
        super().__init__()
        self.columns = columns
        frequencies = theta ** -(torch.arange(0, size // 2, 2) / (size // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)  # [size / 4]

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        code = position_ids[..., None] - 1
        row, column = code.div(self.columns, rounding_mode="floor"), code.remainder(self.columns)
        angles = torch.cat([row * self.frequencies, column * self.frequencies], dim=-1).repeat(1, 1, 2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Placed(nn.Module):
    """Embeddings of whole sequences, and a learned vector of each place beside them."""

    def __init__(self, tokens: nn.Embedding, places: int):
        super().__init__()
        self.tokens = tokens
        vectors = torch.randn(places, tokens.embedding_dim, generator=torch.Generator().manual_seed(0))
        self.places = nn.Parameter(0.02 * vectors)  # as Llama's embeddings start

    def forward(self, ids: Tensor) -> Tensor:
        return self.tokens(ids) + self.places[: ids.shape[1]]


class PositionsTrainer(AutoregressiveTrainer):
    """Trains with positions of one kind. It draws and exports nothing: the folder of stock Llama holds no others."""

    def __init__(self, way: Way, steps: int | None, *what):
        self.way = way
        super().__init__(*what, save=lambda folder, trainer: None, distance=None)
        self.total_steps = min(steps or self.total_steps, self.total_steps)

    def make_network(self) -> LlamaForCausalLM:
        llama = super().make_network()
        body, size, places = llama.model, llama.config.head_dim, llama.config.max_position_embeddings
        if self.way == "rotary-2d":
            body.rotary_emb = Rotary2D(size, self.cache.shape[1])
        if self.way == "table":
            body.rotary_emb.inv_freq.zero_()
        if self.way in ("table", "rotary+table"):
            body.embed_tokens = Placed(body.embed_tokens, places)
        return llama

    def resume(self) -> None:
        self.total_steps = max(self.total_steps, self.run.step)

    def draw(self) -> None:
        pass

    def export(self) -> None:
        pass


def bits(way: Way, config: PositionsConfig, tokenizer: Tokenizer) -> tuple[dict[int, float], float]:
    """{step: bits an image on held-out codes}, and seconds of training by its least disturbed steps."""
    folder = config.cache or config.out / "codes"
    one = TrainConfig(**config.model_dump(exclude={"ways", "steps"}) | {"out": config.out / way, "cache": folder})
    accelerator = make_accelerator(one.run, one.out)
    how = {"workers": one.run.workers, "kind": "codes", "verify": one.cache_verify}
    seen = {"limit": one.cache_images, "crops": one.cache_crops, "split": "train"}
    test = {"limit": one.held_out.images, "split": "test"}
    cache = open_cache(folder, tokenizer, one.data, accelerator, **seen, **how)
    unflipped = one.data.model_copy(update={"flip": False})
    held_out = open_cache(folder / "test", tokenizer, unflipped, accelerator, **test, **how)
    train(PositionsTrainer(way, config.steps, one, accelerator, tokenizer, cache, held_out))
    lines = metrics_of(one.out)
    seconds = lines[-1]["step"] * one.run.batch_size / max(line["images_per_second"] for line in lines)
    return {line["step"]: line["held_out_bits"] for line in lines if "held_out_bits" in line}, seconds


def main() -> None:
    config = configs.parse(PositionsConfig, sys.argv[1:], default_file=CONFIG)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    codebook.prepare(device)
    tokenizer = Tokenizer.from_pretrained(find_tokenizer(config.tokenizer)).to(device)
    found = {way: bits(way, config, tokenizer) for way in config.ways}
    steps = sorted({step for curve, _ in found.values() for step in curve})
    print(f"{machine(device)}; batch {config.run.batch_size}, seed {config.run.seed}\n")
    print(f"| positions {''.join(f'| bits at {step} ' for step in steps)}| seconds |\n|{'---|' * (len(steps) + 2)}")
    for way, (curve, seconds) in found.items():
        shown = [f"{curve[step]:.1f}" if step in curve else "" for step in steps]
        print(f"| {way} | {' | '.join(shown)} | {seconds:.0f} |")


if __name__ == "__main__":
    launch.run(main)
