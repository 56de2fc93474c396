"""State dicts of published tokenizers, in their repositories' names, as diffusers `VQModel`s.

Three networks (VQGAN's, which latent diffusion, IBQ and VQGAN-LC share; LlamaGen's, the same layers by other names;
Open-MAGVIT2's, which SimVQ shares) and six ways to look up a code.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import Tensor

from nsvq.errors import UserError
from nsvq.tokenizer.magvit import MagvitVQModel

State = dict[str, Tensor]

GROUPS = 32  # of every GroupNorm in all of these repositories; no shape tells it
MAX_SIGN_BITS = 20
VQGAN, LLAMAGEN, MAGVIT = "encoder.mid.block_1.", "encoder.conv_blocks.", "encoder.mid_block."  # names of one alone

# Training only: perceptual loss and discriminator, counters, running averages.
DROPPED = re.compile(
    r"(loss|discriminator|perceptual_loss|model_ema)\.|quantize\.(codebook_used|embedding\.(cluster_size|embed_avg))$"
)

# Pieces of names, to diffusers'. <N> is a level that counts from the image, where diffusers counts from the code.
_SHARED = [
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
]
NETWORKS = {
    VQGAN: [
        (r"^encoder\.down\.", "encoder.down_blocks."),
        (r"^decoder\.up\.(\d+)\.", r"decoder.up_blocks.<\1>."),
        (r"\.block\.(\d+)\.", r".resnets.\1."),
        (r"\.attn\.(\d+)\.", r".attentions.\1."),
        (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        *_SHARED,
    ],
    LLAMAGEN: [
        (r"^encoder\.conv_blocks\.", "encoder.down_blocks."),
        (r"^decoder\.conv_blocks\.", "decoder.up_blocks."),
        (r"\.res\.(\d+)\.", r".resnets.\1."),
        (r"\.attn\.(\d+)\.", r".attentions.\1."),
        (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
        (r"\.mid\.0\.", ".mid_block.resnets.0."),
        (r"\.mid\.1\.", ".mid_block.attentions.0."),
        (r"\.mid\.2\.", ".mid_block.resnets.1."),
        *_SHARED,
    ],
    MAGVIT: [
        (r"^encoder\.down\.", "encoder.down_blocks."),
        (r"^decoder\.up\.(\d+)\.", r"decoder.up_blocks.<\1>."),
        (r"^decoder\.adaptive\.(\d+)\.", r"decoder.norms.<\1>."),
        (r"\.mid_block\.(\d+)\.", r".mid_block.resnets.\1."),
        (r"\.block\.(\d+)\.", r".resnets.\1."),
        (r"\.downsample\.", ".downsamplers.0.conv."),
        (r"\.upsample\.conv1\.", ".upsamplers.0.0."),
        *_SHARED,
    ],
}


def averaged(state: State) -> tuple[State, int]:
    """`state` with its moving averages in place, and how many: the repositories that keep them (`model_ema.` and a
    tensor's name without its dots; SEED-Voken, SimVQ) also evaluate with them."""
    found = {name: state[key] for name in state if (key := "model_ema." + name.replace(".", "")) in state}
    return state | found, len(found)


def to_vqmodel(
    source: str, state: State, image_size: int, scaling_factor: float = 1.0, unit_codes: bool = True
) -> tuple[VQModel, list[str]]:
    """The tokenizer in `state` (names of the original) as a float32 model, and the training-only names it leaves out.

    `unit_codes`: LlamaGen's codebook_l2_norm. Raises `UserError` with their names where tensors are missing, unknown
    or of a shape that the model does not hold.
    """
    dropped = [name for name in state if DROPPED.match(name)]
    rest = {name: tensor for name, tensor in state.items() if not DROPPED.match(name)}
    marker, codes = SOURCES[source]
    if not any(name.startswith(marker) for name in rest):
        raise UserError(f"no tokenizer of {source} is in this checkpoint: it has no {marker}*, but {_some(rest)}")
    found = [re.match(r"encoder\.(?:down|conv_blocks)\.(\d+)\.", name) for name in rest]
    levels = 1 + max((int(match[1]) for match in found if match), default=0)
    network = [name for name in rest if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))]
    origin = {_rename(name, NETWORKS[marker], levels): name for name in network}
    weights = {new: rest.pop(name).float() for new, name in origin.items()}
    for name, tensor in weights.items():
        if ".attentions." in name and tensor.dim() == 4:  # 1x1 convolutions there, linear layers here
            weights[name] = tensor.flatten(1)
    if marker == MAGVIT:
        _fit_magvit(weights)
    table = codes(rest, weights, unit_codes).double()
    if rest:
        raise UserError(f"{len(rest)} tensors that {source}'s tokenizer does not have: {_some(rest)}")
    for name, axis in (("quant_conv.weight", 0), ("quant_conv.bias", 0), ("post_quant_conv.weight", 1)):
        weights[name] = _widen(_take(weights, name), axis, table.shape[1])
    weights["quantize.embedding.weight"] = table.float()

    arguments = _architecture(weights, levels) | {"sample_size": image_size, "scaling_factor": scaling_factor}
    with torch.device("meta"):
        if marker == MAGVIT:
            model = MagvitVQModel(adaptive_norm="decoder.norms.0.gamma.weight" in weights, **arguments)
        else:
            model = VQModel(**arguments)
    _compare(weights, {name: tensor.shape for name, tensor in model.state_dict().items()}, origin, type(model).__name__)
    model.load_state_dict({name: tensor.contiguous() for name, tensor in weights.items()}, assign=True)
    return model.eval(), dropped


def _rename(name: str, pieces: list[tuple[str, str]], levels: int) -> str:
    for pattern, new in pieces:
        name = re.sub(pattern, new, name)
    return re.sub(r"<(\d+)>", lambda level: str(levels - 1 - int(level[1])), name)


def _architecture(weights: State, levels: int) -> dict:
    """`VQModel`'s arguments, read off diffusers' names and the shapes."""

    def blocks(side: str, kind: str) -> list[str]:
        attention = [any(n.startswith(f"{side}_blocks.{i}.attentions.") for n in weights) for i in range(levels)]
        return [f"Attn{kind}" if found else kind for found in attention]

    first_level = [n for n in weights if re.match(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight", n)]
    levels_out = [_take(weights, f"encoder.down_blocks.{i}.resnets.0.conv2.weight").shape[0] for i in range(levels)]
    codes, dim = weights["quantize.embedding.weight"].shape
    return {
        "in_channels": _take(weights, "encoder.conv_in.weight").shape[1],
        "out_channels": _take(weights, "decoder.conv_out.weight").shape[0],
        "down_block_types": blocks("encoder.down", "DownEncoderBlock2D"),
        "up_block_types": blocks("decoder.up", "UpDecoderBlock2D"),
        "block_out_channels": levels_out,
        "layers_per_block": len(first_level),
        "latent_channels": _take(weights, "encoder.conv_out.weight").shape[0],
        "num_vq_embeddings": codes,
        "vq_embed_dim": dim,
        "norm_num_groups": GROUPS,
        "mid_block_add_attention": any(n.startswith("encoder.mid_block.attentions.") for n in weights),
    }


def _fit_magvit(weights: State) -> None:
    """What Open-MAGVIT2's network leaves out, or orders otherwise than `MagvitVQModel`."""
    for name in list(weights):
        if re.search(r"^encoder\.conv_in\.weight|\.resnets\.\d+\.(conv1|conv2|conv_shortcut)\.weight", name):
            weights[name.replace(".weight", ".bias")] = torch.zeros(len(weights[name]))
        elif ".upsamplers." in name:  # depth to space reads channels as (y, x, C), PixelShuffle as (C, y, x)
            weights[name] = weights[name].unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)
    kernel = _take(weights, "encoder.conv_out.weight")  # 1x1, where `VQModel` has 3x3
    weights["encoder.conv_out.weight"] = F.pad(kernel, (1, 1, 1, 1))
    for name in ("quant_conv", "post_quant_conv"):
        weights[f"{name}.weight"] = torch.eye(len(kernel))[:, :, None, None]
        weights[f"{name}.bias"] = torch.zeros(len(kernel))


def _widen(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Zeros behind `tensor` along `axis`: latents of 0, which the decoder does not read."""
    more = max(0, size - tensor.shape[axis])
    return torch.cat([tensor, tensor.new_zeros(*tensor.shape[:axis], more, *tensor.shape[axis + 1 :])], axis)


# Codes: what a state dict has beside the network -> a table [K, D], D >= d, whose row nearest to (z, 0, ...) is the
# code. Each takes what it reads out of `rest`.


def _table(rest: State, weights: State, unit_codes: bool) -> Tensor:
    if "quantize.proj.weight" in rest:
        return _gumbel(rest, weights)
    return _take(rest, "quantize.embedding.weight", pop=True)


def _gumbel(rest: State, weights: State) -> Tensor:
    """taming's Gumbel models: a linear layer scores the codes, and another table has what the decoder sees of them.

    A row holds both, and `post_quant_conv` skips the first. Without the noise that training adds to the scores.
    """
    scores, bias = _linear(rest, "quantize.proj")
    weight = _take(weights, "post_quant_conv.weight")
    weights["post_quant_conv.weight"] = torch.cat([weight.new_zeros(len(weight), scores.shape[1], 1, 1), weight], 1)
    codes = _take(rest, "quantize.embed.weight", pop=True).double()
    return _by_product(torch.cat([scores.flatten(1), codes], 1), bias[:, None])


def _inner_product(rest: State, weights: State, unit_codes: bool) -> Tensor:
    return _by_product(_take(rest, "quantize.embedding.weight", pop=True).double())


def _by_product(rows: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Rows [K, D] float64 with one more column: the nearest to (z, 0) is that of the largest z.row + bias [K, 1].

    With s^2 = max(|r|^2 + 2 b) - |r|^2 - 2 b, |(z, 0) - (r, s)|^2 is a constant - 2 (z.r + b).
    """
    lengths = rows.square().sum(1, keepdim=True) + 2 * bias
    return torch.cat([rows, (lengths.max() - lengths).sqrt()], 1)


def _cosine(rest: State, weights: State, unit_codes: bool) -> Tensor:
    """Unit codes, as the decoder sees them too: the nearest is the one of the largest cosine."""
    codes = _take(rest, "quantize.embedding.weight", pop=True).double()
    return F.normalize(codes, dim=1) if unit_codes else codes


def _simvq(rest: State, weights: State, unit_codes: bool) -> Tensor:
    base = _take(rest, "quantize.embedding.weight", pop=True).double()
    return F.linear(base, *_linear(rest, "quantize.embedding_proj"))


def _signs(rest: State, weights: State, unit_codes: bool) -> Tensor:
    """Lookup-free quantization: bit i of a code's number, the lowest first, is the sign of channel i."""
    bits = len(weights["encoder.conv_out.weight"])
    if bits > MAX_SIGN_BITS:
        raise UserError(f"latents of {bits} channels have 2^{bits} sign codes; a table holds at most 2^{MAX_SIGN_BITS}")
    return (torch.arange(2**bits)[:, None] >> torch.arange(bits) & 1) * 2.0 - 1.0


def _features(rest: State, weights: State, unit_codes: bool) -> Tensor:
    """VQGAN-LC: features through one linear layer, or two with a ReLU between, or none."""
    if len(_take(weights, "quant_conv.weight")) == 768:
        raise UserError("VQGAN-LC divides latents of 768 channels by their length, which a stock VQModel does not do")
    codes = _take(rest, "tok_embeddings.weight", pop=True).double()
    if "codebook_projection.weight" in rest:
        return F.linear(codes, *_linear(rest, "codebook_projection"))
    if "codebook_projection.0.weight" in rest:
        hidden = F.linear(codes, *_linear(rest, "codebook_projection.0")).relu()
        return F.linear(hidden, *_linear(rest, "codebook_projection.2"))
    for name in ("cluster_size", "embed_avg"):  # running sums, of which the table is the quotient
        rest.pop(name, None)
    return codes


def _linear(rest: State, layer: str) -> tuple[Tensor, Tensor]:
    return _take(rest, f"{layer}.weight", pop=True).double(), _take(rest, f"{layer}.bias", pop=True).double()


SOURCES: dict[str, tuple[str, Callable[[State, State, bool], Tensor]]] = {
    "taming": (VQGAN, _table),
    "llamagen": (LLAMAGEN, _cosine),
    "simvq": (MAGVIT, _simvq),
    "magvit2": (MAGVIT, _signs),
    "ibq": (VQGAN, _inner_product),
    "vqgan-lc": (VQGAN, _features),
}


def _compare(weights: State, shapes: dict, origin: dict[str, str], model: str) -> None:
    unknown = [origin.get(name, name) for name in weights if name not in shapes]
    missing = [name for name in shapes if name not in weights]
    wrong = [
        f"{origin.get(name, name)} {list(weights[name].shape)} (there {list(shape)})"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    found = [(unknown, "has no place for"), (missing, "needs, by its own names,"), (wrong, "has another shape for")]
    if any(names for names, _ in found):
        raise UserError("; ".join(f"{model} {what} {_some(names)}" for names, what in found if names))


def _take(tensors: State, name: str, pop: bool = False) -> Tensor:
    if name not in tensors:
        raise UserError(f"{name} is missing from this checkpoint")
    return tensors.pop(name) if pop else tensors[name]


def _some(names, most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
