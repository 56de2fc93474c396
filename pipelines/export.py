"""From a trained network and its tokenizer to a folder that stock diffusers loads.

<folder>/transformer  vae  scheduler    of `DiTPipeline`; the transformer is diffusers' own `DiTTransformer2DModel`, or
                                        `UNet2DModel` with classes; `model.variant: modern` ships its code instead:
                                        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
<folder>/unet  vqvae  scheduler         of `LDMPipeline`, for a U-Net without classes
<folder>/model_index.json  nsvq.json  README.md
No class of this project is in it otherwise, but where the tokenizer's method needs one (docs/tokenizers.md).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import DiTPipeline, DiTTransformer2DModel, LDMPipeline, ModelMixin, UNet2DModel
from torch import Tensor, nn

from nsvq.diffusion import dit
from nsvq.diffusion.dit import DiT, PipelineDiT
from nsvq.diffusion.unet import UNet
from nsvq.files import atomic_folder
from nsvq.pipelines.card import write_card
from nsvq.pipelines.folders import SHIPPED_DIT

STOCK_NULL_CLASS = 1000  # DiTPipeline's "no class", whatever the number of classes
_IN_BLOCKS = {"attention.out": "attn1.to_out.0", "mlp.fc_in": "ff.net.0.proj", "mlp.fc_out": "ff.net.2"}


def stock_label(class_id: int) -> int:
    """The label of a class in `DiTPipeline`: its id, but for the place of "no class"."""
    return class_id + (class_id >= STOCK_NULL_CLASS)


def label_table(embeddings: Tensor) -> Tensor:
    """Class embeddings [C + 1, D], null row last, as the stock table [max(C, 1000) + 1, D], null row at 1000 (see
    `stock_label`). Rows before it that no class has repeat it: a class that does not exist gives unconditional
    samples."""
    first, beyond = embeddings[:-1].tensor_split([STOCK_NULL_CLASS])
    null_rows = embeddings[-1:].expand(STOCK_NULL_CLASS + 1 - len(first), -1)
    return torch.cat([first, null_rows, beyond])


@torch.no_grad()
def to_stock(model: DiT | UNet) -> DiTTransformer2DModel | PipelineDiT | UNet2DModel:
    """The class that a pipeline holds, in the weights' type, with the same outputs to float error; the label
    `model.null_class` becomes 1000, and others what `stock_label` says."""
    if isinstance(model, UNet):
        # With classes, as many embeddings as `DiTPipeline` has labels, so that it takes the U-Net for a transformer.
        options, weights = arguments(model), model.state_dict()
        if options["num_class_embeds"] is not None:
            weights["class_embedding.weight"] = label_table(weights["class_embedding.weight"])
            options["num_class_embeds"] = len(weights["class_embedding.weight"])
        stock = UNet2DModel(**options)
        stock.load_state_dict(weights)
        return nn.Module.to(stock, model.dtype).eval()
    if model.config.variant == "modern":
        # DiTPipeline asks the config for its out_channels.
        shipped = PipelineDiT(**arguments(model) | {"out_channels": model.config.in_channels})
        shipped.load_state_dict(model.state_dict())
        return nn.Module.to(shipped, model.dtype).eval()
    return _stock_dit(model)


def _stock_dit(model: DiT) -> DiTTransformer2DModel:
    """Stock blocks each hold an embedder of time and class, and the layer of their modulation: each gets a copy of the
    embedder there is, and its rows of our one layer."""
    config = model.config
    stock = DiTTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=config.in_channels,
        out_channels=config.in_channels,  # DiTPipeline divides by it, and its default is None
        num_layers=config.depth,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        activation_fn="gelu",
        num_embeds_ada_norm=max(config.num_classes, STOCK_NULL_CLASS),
        norm_eps=dit.EPS,
    )
    own, layers = model.state_dict(), 2 * config.depth
    labels, weights = label_table(own["class_embed.weight"]), dict[str, Tensor]()
    for kind in ("weight", "bias"):
        weights |= {f"{new}.{kind}": own[f"{old}.{kind}"] for old, new in _names(config.depth).items()}
        rows = own[f"modulation.{kind}"].unflatten(0, (-1, config.width))
        gate, shift, scale = rows.split([layers, layers + 1, layers + 1])
        weights[f"proj_out_1.{kind}"] = torch.cat([shift[-1], scale[-1]])
        for i in range(config.depth):
            block = f"transformer_blocks.{i}"
            for name, part in zip("qkv", own[f"blocks.{i}.attention.qkv.{kind}"].chunk(3), strict=True):
                weights[f"{block}.attn1.to_{name}.{kind}"] = part
            of_both = [part for k in (2 * i, 2 * i + 1) for part in (shift[k], scale[k], gate[k])]
            weights[f"{block}.norm1.linear.{kind}"] = torch.cat(of_both)
            for k in (1, 2):
                weights[f"{block}.norm1.emb.timestep_embedder.linear_{k}.{kind}"] = own[f"time_embed.linear_{k}.{kind}"]
            weights[f"{block}.norm1.emb.class_embedder.embedding_table.weight"] = labels
    stock.load_state_dict(weights)
    return nn.Module.to(stock, model.dtype).eval()


@torch.no_grad()
def from_stock(stock: DiTTransformer2DModel) -> PipelineDiT:
    """The inverse of `to_stock`, to sample faster: our class of 1000 or more classes, in the stock one's type and
    place. It takes the weights out of `stock`, which has none afterwards, so that memory does not hold both. Raises
    `ValueError` where it is not a model of ours, and leaves it as it is: where its embedders differ or its shape has no
    counterpart."""
    config, device, theirs = stock.config, stock.device, stock.state_dict()
    depth, heads = config.num_layers, config.num_attention_heads
    width, layers = heads * config.attention_head_dim, 2 * depth
    shape = (config.activation_fn, config.out_channels, config.norm_elementwise_affine, config.attention_bias)
    if shape != ("gelu", config.in_channels, False, True) or config.num_embeds_ada_norm < STOCK_NULL_CLASS:
        raise ValueError("the transformer has another architecture than diffusion/dit.py")
    blocks = [f"transformer_blocks.{i}" for i in range(depth)]
    embedder = [name.removeprefix(blocks[0]) for name in theirs if name.startswith(f"{blocks[0]}.norm1.emb.")]
    for name in embedder:
        if not all(torch.equal(theirs[block + name], theirs[blocks[0] + name]) for block in blocks):
            raise ValueError("the transformer's blocks embed time and class differently")
    # A tensor goes when it is popped; all are copied, since one of them would keep the file that they are mapped from.
    nn.Module.to(stock, "meta")
    for block in blocks[1:]:
        for name in embedder:
            del theirs[block + name]

    labels = theirs.pop(f"{blocks[0]}.norm1.emb.class_embedder.embedding_table.weight")
    null = STOCK_NULL_CLASS
    weights = {"class_embed.weight": torch.cat([labels[:null], labels[null + 1 :], labels[null : null + 1]])}
    for kind in ("weight", "bias"):
        for new, old in _names(depth).items():
            weights[f"{new}.{kind}"] = theirs.pop(f"{old}.{kind}").clone()
        last = theirs.pop(f"proj_out_1.{kind}").unflatten(0, (2, width))
        rows = last.new_empty(3 * layers + 2, *last.shape[1:])
        gate, shift, scale = rows.split([layers, layers + 1, layers + 1])
        shift[-1], scale[-1] = last
        for i, block in enumerate(blocks):
            qkv = [theirs.pop(f"{block}.attn1.to_{name}.{kind}") for name in "qkv"]
            weights[f"blocks.{i}.attention.qkv.{kind}"] = torch.cat(qkv)
            parts = theirs.pop(f"{block}.norm1.linear.{kind}").unflatten(0, (6, width))
            for k in (0, 1):  # attention, MLP
                shift[2 * i + k], scale[2 * i + k], gate[2 * i + k] = parts[3 * k : 3 * k + 3]
        weights[f"modulation.{kind}"] = rows.flatten(0, 1)
    with init_empty_weights():
        sizes = (config.sample_size, config.in_channels, len(labels) - 1, config.patch_size, depth, width, heads)
        model = PipelineDiT(*sizes, out_channels=config.out_channels)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval()


def _names(depth: int) -> dict[str, str]:
    """Layers that our DiT has in the form of the stock one: {its name: the stock one's, in the first block for what is
    the same in all}."""
    names = {"patch_embed.proj": "pos_embed.proj", "proj_out": "proj_out_2"}
    for k in (1, 2):
        names[f"time_embed.linear_{k}"] = f"transformer_blocks.0.norm1.emb.timestep_embedder.linear_{k}"
    for i in range(depth):
        for ours, theirs in _IN_BLOCKS.items():
            names[f"blocks.{i}.{ours}"] = f"transformer_blocks.{i}.{theirs}"
    return names


def arguments(part) -> dict:
    """What a model or scheduler was constructed with."""
    return {name: value for name, value in part.config.items() if not name.startswith("_")}


def save_pipeline(
    folder: Path,
    network: ModelMixin,
    vae: ModelMixin,
    scheduler,
    classes: dict[int, str],
    about: dict | None = None,
    variant: str | None = None,
) -> None:
    """Write the pipeline folder of `network` (see `to_stock`) in one step, class names included, in place of what was
    there; weights of a `variant`, such as "fp16", beside it. `about` says how it was trained (see `pipelines.card`),
    and goes to nsvq.json and the model card."""
    with atomic_folder(folder) as part:
        if variant and folder.is_dir():
            shutil.copytree(folder, part, dirs_exist_ok=True)
        if isinstance(network, UNet2DModel) and network.config.num_class_embeds is None:
            LDMPipeline(vae, network, scheduler).save_pretrained(part, variant=variant)
        else:
            DiTPipeline(network, vae, scheduler).save_pretrained(part, variant=variant)
            # DiTPipeline reads its names from here, but does not save them.
            changes: dict[str, Any] = {"id2label": {str(stock_label(i)): name for i, name in classes.items()}}
            if isinstance(network, PipelineDiT):
                shutil.copyfile(dit.__file__, part / "transformer" / f"{SHIPPED_DIT}.py")
                changes["transformer"] = [SHIPPED_DIT, PipelineDiT.__name__]
            index = part / "model_index.json"
            index.write_text(json.dumps(json.loads(index.read_text()) | changes, indent=2, ensure_ascii=False) + "\n")
        if about is not None:
            (part / "nsvq.json").write_text(json.dumps(about, indent=2) + "\n")
            write_card(part)
