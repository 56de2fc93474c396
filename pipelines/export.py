"""From a trained DiT and its tokenizer to a folder that stock diffusers loads. No class of this project is in it, but
where the tokenizer's method needs one (docs/tokenizers.md).

<folder>/transformer (DiTTransformer2DModel)  vae (VQModel)  scheduler  model_index.json  nsvq.json  README.md
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, SchedulerMixin, VQModel
from torch import Tensor

from common.errors import UserError
from diffusion.model import DiT
from pipelines.card import write_card

STOCK_NULL_CLASS = 1000  # DiTPipeline's "no class", whatever the number of classes


def check_classes(count: int) -> None:
    """Raises `UserError` where the stock pipeline has no room for `count` classes."""
    if count > STOCK_NULL_CLASS:
        raise UserError(
            f"a DiT of {count} classes cannot be exported: the stock DiTPipeline hard-codes {STOCK_NULL_CLASS} as its "
            f"null class, which leaves room for {STOCK_NULL_CLASS} classes"
        )


def label_table(embeddings: Tensor) -> Tensor:
    """Class embeddings [C + 1, D], null row last, as the stock table [1001, D]: classes first, null row last.

    The rows between repeat the null row, so a class that does not exist gives unconditional samples.
    """
    classes, null_row = embeddings[:-1], embeddings[-1:]
    check_classes(len(classes))
    return torch.cat([classes, null_row.expand(STOCK_NULL_CLASS + 1 - len(classes), -1)])


@torch.no_grad()
def to_stock(model: DiT) -> DiTTransformer2DModel:
    """The stock class with the same outputs to float error; the label `model.null_class` becomes 1000.

    Stock blocks each hold an embedder of time and class: each gets a copy of the one there is. Raises `UserError` where
    there are more than 1000 classes.
    """
    config = model.config
    stock = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.in_channels,
        out_channels=config.in_channels,  # DiTPipeline divides by it, and its default is None
        num_layers=config.depth,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=STOCK_NULL_CLASS,
        norm_eps=1e-6,
    )
    own = model.state_dict()
    weights = {f"pos_embed.proj.{kind}": own[f"patch_embed.proj.{kind}"] for kind in ("weight", "bias")}
    weights |= _linear(own, "modulation_out", "proj_out_1") | _linear(own, "proj_out", "proj_out_2")
    labels = label_table(own["class_embed.weight"])
    for i in range(config.depth):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        for layer in ("linear_1", "linear_2"):
            weights |= _linear(own, f"time_embed.{layer}", f"{theirs}.norm1.emb.timestep_embedder.{layer}")
        weights[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = labels
        weights |= _linear(own, f"{ours}.modulation", f"{theirs}.norm1.linear")
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", own[f"{ours}.qkv.{kind}"].chunk(3), strict=True):
                weights[f"{theirs}.attn1.to_{name}.{kind}"] = part
        weights |= _linear(own, f"{ours}.attention_out", f"{theirs}.attn1.to_out.0")
        weights |= _linear(own, f"{ours}.mlp_in", f"{theirs}.ff.net.0.proj")
        weights |= _linear(own, f"{ours}.mlp_out", f"{theirs}.ff.net.2")
    stock.load_state_dict(weights)
    return stock.eval()


def _linear(weights: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {f"{new}.{kind}": weights[f"{old}.{kind}"] for kind in ("weight", "bias")}


def save_pipeline(
    folder: Path,
    transformer: DiTTransformer2DModel,
    vae: VQModel,
    scheduler: SchedulerMixin,
    classes: dict[int, str],
    about: dict | None = None,
) -> None:
    """Write the stock pipeline folder in one step, class names included, in place of what was there.

    `about` says how it was trained (see `pipelines.card`), and goes to nsvq.json and the model card.
    """
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    DiTPipeline(transformer, vae, scheduler).save_pretrained(temporary)
    # DiTPipeline reads its names from here, but does not save them.
    index = temporary / "model_index.json"
    names = {"id2label": {str(i): name for i, name in classes.items()}}
    index.write_text(json.dumps(json.loads(index.read_text()) | names, indent=2, ensure_ascii=False) + "\n")
    if about is not None:
        (temporary / "nsvq.json").write_text(json.dumps(about, indent=2) + "\n")
        write_card(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
