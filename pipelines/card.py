"""The model card: README.md of a pipeline folder, from its nsvq.json and from measured results."""

import json
from pathlib import Path

from nsvq.files import atomic_file

PAPER = "2606.11363"
_NETWORKS = {"dit": "DiT", "modern": "DiT (modern variant)", "unet": "U-Net", "llama": "autoregressive transformer"}
_ARXIV = "https://arxiv.org/abs/"
_NSVQ = f"NSVQ (non-stationary-aware vector quantization): {_ARXIV}{PAPER}"
_CITATIONS = {
    "dit": f"Peebles and Xie, Scalable Diffusion Models with Transformers, {_ARXIV}2212.09748",
    "modern": f"Peebles and Xie, {_ARXIV}2212.09748, with the parts of LightningDiT (Yao et al., {_ARXIV}2501.01423)",
    "unet": f"Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, {_ARXIV}2112.10752",
    "llama": f"Sun et al., Autoregressive Model Beats Diffusion (LlamaGen), {_ARXIV}2406.06525",
}


def write_card(folder: Path, results: dict[str, dict] | None = None) -> Path:
    """Write README.md into a pipeline folder, and return its path.

    `results`: {heading: a result of eval/reconstruction.py or eval/generation.py, as read from its JSON file}. What was
    trained, how and on what comes from nsvq.json, which training leaves in the folder."""
    about = json.loads((folder / "nsvq.json").read_text())
    index = json.loads((folder / "model_index.json").read_text())
    vae = json.loads((folder / ("vqvae" if "vqvae" in index else "vae") / "config.json").read_text())
    names, variant = index.get("id2label", {}), about["config"]["model"].get("variant", "llama")
    network = f"The network: {_CITATIONS[variant]}.\n"
    use = _use_tokens(about, names, vae) if variant == "llama" else _use(names, variant, index["_class_name"])
    parts = [
        _front_matter(about, names, variant, vae),
        _summary(about, names, vae, variant),
        use,
        _training(about, bool(names)),
        _results(results or {}),
        _limits(len(names), index["scheduler"][1] if "scheduler" in index else None),
        "## Citation\n\n" + (f"The tokenizer's method, {_NSVQ}.\n" if _codes(vae) else "") + network,
    ]
    path = folder / "README.md"
    with atomic_file(path) as part:
        part.write_text("\n".join(parts))
    return path


def _codes(vae: dict) -> int:
    """Of the tokenizer's codebook; 0 without one."""
    return vae.get("num_vq_embeddings", 0)


def _front_matter(about: dict, names: dict[str, str], variant: str, vae: dict) -> str:
    source = about["config"]["data"]["source"]
    from_hub = source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()
    kind = "class-conditional" if names else "unconditional"
    network = {"unet": "diffusion, unet", "llama": "autoregressive, llama"}.get(variant, "diffusion, dit")
    data = f"\ndatasets: [{source}]" if from_hub else ""
    method = f", vector-quantization, nsvq, 'arxiv:{PAPER}'" if _codes(vae) else ", nsvq"
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [{kind}-image-generation, {network}{method}]{data}
# license: to be set by whoever publishes the model; it depends on the training data
---
"""


def _summary(about: dict, names: dict[str, str], vae: dict, variant: str) -> str:
    key, latents = about["latents"]["key"], about["latents"]
    *channels, height, width = latents["shape"][1:]
    shown = ", ".join(list(names.values())[:10]) + (", ..." if len(names) > 10 else "")
    kind = f"{'Class-conditional' if names else 'Unconditional'} {_NETWORKS[variant]}"
    does, space, what = "The tokenizer's decoder quantizes what it samples.", "in the latent space", "latents"
    if not channels:
        does, space, what = "It generates them row by row, each given those before it.", "on the codes", "tokens"
    shape = " x ".join(map(str, (height, width, *channels)))
    tokenizer, on = f"{_codes(vae)} codes of {vae.get('vq_embed_dim')} dimensions", "vector-quantized"
    if not _codes(vae):
        tokenizer, on, does = (
            f"`{vae['_class_name']}`, without a codebook",
            "continuous",
            "Its decoder takes any latents.",
        )
    return f"""# {kind} on {on} latents

{about["parameters"] / 1e6:.1f} M parameters, trained {space} of a frozen image tokenizer
({tokenizer}).
{does}

- Images: {key["image_size"]} x {key["image_size"]} pixels; {what}: {shape}
- Classes: {f"{len(names)} ({shown})" if names else "none"}
- Data: `{about["config"]["data"]["source"]}`, {latents["count"]} training images
"""


def _use(names: dict[str, str], variant: str, pipeline: str) -> str:
    code = ", trust_remote_code=True" if variant == "modern" else ""
    intro = "With `diffusers` alone" + (", which runs the model's code in `transformer/nsvq_dit.py`:" if code else ":")
    what = "" if pipeline == "LDMPipeline" else f"class_labels=[{0 if names else 1000}], "
    what += "guidance_scale=2.0, " if names else ""
    adds, how = "one seed an image, batches, samplers by name and callbacks", "[None], seeds=[0]"
    if names:
        adds = "class names, a guidance interval, " + adds
        label = next(iter(names.values())).split(",")[0].strip()
        how = f"[{label!r}], guidance_scale=2.0, guidance_interval=(0.0, 0.8), seeds=[0]"
    return f"""## Use

{intro}

```python
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder"{code})
image = pipeline({what}num_inference_steps=50).images[0]
```

With the project's own class, which adds {adds}:

```python
from nsvq import ClassConditionalPipeline
pipeline = ClassConditionalPipeline.from_pretrained("path/to/this/folder")
image = pipeline({how}).images[0]
```
"""


def _use_tokens(about: dict, names: dict[str, str], vae: dict) -> str:
    codes, (height, width) = vae["num_vq_embeddings"], about["latents"]["shape"][1:]
    stock, null = vae["_class_name"] == "VQModel", codes + len(names)
    classes = f"{codes} to {null - 1} are the classes, {null} is" if names else f"{codes} is"
    call = f"[{next(iter(names.values())).split(',')[0].strip()!r}], guidance_scale=2.0" if names else "[None]"
    return f"""## Use

With `transformers` and {"`diffusers`" if stock else "this project's `VQModel`"} alone, a causal language model: the ids
below {codes} are codes, {classes} "no class".

```python
import torch
from {"diffusers import" if stock else "nsvq.tokenizer.vqmodel import QuantizerVQModel as"} VQModel
from transformers import AutoModelForCausalLM
folder = "path/to/this/folder"
model = AutoModelForCausalLM.from_pretrained(folder, subfolder="transformer")
vae = VQModel.from_pretrained(folder, subfolder="vae")
ids, null = torch.tensor([[{codes}]]), torch.tensor([[{null}]])  # {codes} + class
guidance = {{"guidance_scale": {2.0 if names else 1.0}, "negative_prompt_ids": null}}
tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **guidance)[:, 1:]
z = vae.quantize.get_codebook_entry(tokens.flatten(), (1, {height}, {width}, {vae["vq_embed_dim"]}))
image = vae.decode(z, force_not_quantize=True).sample / 2 + 0.5  # [1, 3, H, W], about in [0, 1]
```

As a pipeline, with class names, one seed an image and guidance in one batch, which runs `nsvq_autoregressive.py`:

```python
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)
image = pipeline({call}, seeds=[0]).images[0]
```

`from nsvq import ClassConditionalPipeline` loads the same folder without running that file.
"""


def _training(about: dict, conditional: bool) -> str:
    config, latents = about["config"], about["latents"]
    optim, run, key = config["optim"], config["run"], latents["key"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    views = "ADM's centre crop" + (f" and {key['crops'] - 1} of its random crops" if key["crops"] > 1 else "")
    views += ", and the mirror image of each" if key["flips"] == 2 else ""
    warmup = optim.get("warmup_steps", config.get("schedule", {}).get("warmup_steps"))
    statistics = _statistics(latents) if "std" in latents else ""
    dropped = f"; labels dropped with probability {config['model']['class_dropout']:g}" if conditional else ""
    return f"""## Training

- Steps: {about["step"]}; batch {run["batch_size"]}; {about["samples_seen"]} samples seen
- Optimizer: AdamW, learning rate {optim["lr"]:g}, betas {tuple(optim["betas"])}, weight decay
  {optim["weight_decay"]:g}, gradient norm at most {optim["clip_grad_norm"]:g}, {warmup} warm-up steps;
  mixed precision: {run["mixed_precision"]}; averaged weights with decay {optim["ema_decay"]:g}
- Objective: {about["objective"]}{dropped}
- Images: {views}; {latents["bad_images"]} images did not decode and were left out
{statistics}- Tokenizer: {_tokenizer(about.get("tokenizer"))}SHA-256 {key["tokenizer"]}
- Software: nsvq {about["nsvq"]}, {versions}; all settings are in `nsvq.json`
"""


def _statistics(latents: dict) -> str:
    channel_means, kind = [abs(value) for value in latents["mean"]], latents["key"]["latents"]
    return f"""- Latents: {kind}; over the training set, as the network sees them: overall deviation
  {latents["overall_std"]:.4f}; deviation of a channel {min(latents["std"]):.4f} to
  {max(latents["std"]):.4f}; largest mean of a channel {max(channel_means):.4f}
"""


def _tokenizer(about: dict | None) -> str:
    """How the tokenizer was trained, where its folder says so."""
    if about is None or "nsvq" not in about["config"]:
        return ""
    config = about["config"]
    return (
        f"quantizer {config['quantizer']['name']}, {_nsvq(**config['nsvq'])}; {about['samples_seen']} samples of "
        f"`{config['data']['source']}` in {config['schedule']['epochs']:g} epochs; perceptual loss "
        f"{config['loss']['perceptual']}, GAN weight {config['loss']['adversarial_weight']:g};\n  "
    )


def _nsvq(pull: dict | None, revive: float | None, replace: dict | None, freeze: dict | None, **_) -> str:
    """Which parts of NSVQ kept the codes alive."""
    parts = [
        *([f"NS loss {pull['weight']:g} at temperature {pull['temperature']:g}"] if pull else []),
        *([f"codes revived after {revive:g} tokens"] if revive else []),
        *([f"dead codes replaced after epoch {replace['after']}"] if replace else []),
        *([f"encoder frozen by epoch {freeze['latest']}"] if freeze else []),
    ]
    return f"NSVQ ({', '.join(parts)})" if parts else "without NSVQ"


def _results(results: dict[str, dict]) -> str:
    lines = ["## Results", ""] if results else ["## Results\n\nNot measured yet.\n"]
    for heading, result in results.items():
        counts = result["counts"]
        number = f"{counts['samples']} samples" if "samples" in counts else f"{counts['images']} images"
        what = f"Protocol `{result['protocol']}`: {number}, {compared_with(result)}"
        if setting := result.get("setting"):
            what += f", {described(setting)}, {result['seeds']}"
        lines += [f"### {heading}", "", f"{what}; nsvq {result['versions']['nsvq']}.", "", "| | | |", "|---|---|---|"]
        lines += [f"| {name} | {number} | {note} |" for name, number, note in table_rows(result)]
        lines += ["", f"    {result['command']}", "", *(f"Warning: {warning}\n" for warning in result["warnings"])]
    return "\n".join(lines)


def table_rows(result: dict) -> list[tuple[str, str, str]]:
    """(name, number, meaning) of each number of a result, as read from its JSON file, and of what it skipped."""
    numbers = {name: "-" if value is None else f"{value:.5g}" for name, value in result["metrics"].items()}
    rows = [(name, number, result["meanings"].get(name, "")) for name, number in numbers.items()]
    return rows + [(name, "skipped", why) for name, why in result["skipped"].items()]


def compared_with(result: dict) -> str:
    """The real images of a result, in words: "test split of someone/pets", or "reference adm"."""
    data, reference = result["data"], result.get("reference", {}).get("source", "test")
    file = None if reference in ("train", "test") else f"reference {reference}"
    split = data["split"] and f"{data['split']} split of {data['source']}"
    return " and ".join(filter(None, (file, split)))


def described(setting: dict) -> str:
    """How samples were made, in words: "guidance 1.5, 25 steps", "guidance 2, temperature 1, top k 0", "resize 256"."""
    words = {name: f"{name.removesuffix('_scale').replace('_', ' ')} {value:g}" for name, value in setting.items()}
    if "steps" in words:
        words["steps"] = f"{setting['steps']} steps"
    return ", ".join(words.values())


def _limits(classes: int, scheduler: str | None) -> str:
    knows = f"its {classes} classes at its" if classes else "its"
    guided = "uses guidance only for `guidance_scale` > 1, takes class ids, and " if classes else ""
    steps = "in at most about 300 steps: its scheduler's timesteps are integers from 0 to 1000"
    if scheduler == "DDIMScheduler":
        steps = "in numbers of steps that divide 1000"
    return f"""## Limits

- It knows {knows} one image size, with the biases of its training data. Samples do not show real
  people, places or events, and must not be passed off as such.
- An image's detail is bounded by the tokenizer: see its reconstruction figures.
{f"- The stock pipeline {guided}samples {steps}.{chr(10)}" if scheduler else ""}"""
