"""The model card: README.md of a pipeline folder, from its nsvq.json and from measured results."""

import json
from pathlib import Path

from nsvq.files import atomic_file

PAPER = "2606.11363"
_NETWORKS = {"dit": "DiT", "modern": "DiT (modern variant)", "unet": "U-Net"}
_ARXIV = "https://arxiv.org/abs/"
_NSVQ = f"NSVQ (non-stationary-aware vector quantization): {_ARXIV}{PAPER}"
_CITATIONS = {
    "dit": f"Peebles and Xie, Scalable Diffusion Models with Transformers, {_ARXIV}2212.09748",
    "modern": f"Peebles and Xie, {_ARXIV}2212.09748, with the parts of LightningDiT (Yao et al., {_ARXIV}2501.01423)",
    "unet": f"Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, {_ARXIV}2112.10752",
}


def write_card(folder: Path, results: dict[str, dict] | None = None) -> Path:
    """Write README.md into a pipeline folder, and return its path.

    `results`: {heading: a result of eval/reconstruction.py or eval/generation.py, as read from its JSON file}. What was
    trained, how and on what comes from nsvq.json, which training leaves in the folder."""
    about = json.loads((folder / "nsvq.json").read_text())
    index = json.loads((folder / "model_index.json").read_text())
    vae = json.loads((folder / ("vqvae" if "vqvae" in index else "vae") / "config.json").read_text())
    names, variant = index.get("id2label", {}), about["config"]["model"]["variant"]
    parts = [
        _front_matter(about, names, variant),
        _summary(about, names, vae),
        _use(names, variant, index["_class_name"]),
        _training(about, bool(names)),
        _results(results or {}),
        _limits(len(names), index["scheduler"][1]),
        f"## Citation\n\nThe tokenizer's method, {_NSVQ}.\nThe network: {_CITATIONS[variant]}.\n",
    ]
    path = folder / "README.md"
    with atomic_file(path) as part:
        part.write_text("\n".join(parts))
    return path


def _front_matter(about: dict, names: dict[str, str], variant: str) -> str:
    source = about["config"]["data"]["source"]
    from_hub = source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()
    kind, network = "class-conditional" if names else "unconditional", "unet" if variant == "unet" else "dit"
    data = f"\ndatasets: [{source}]" if from_hub else ""
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [{kind}-image-generation, diffusion, {network}, vector-quantization, nsvq, 'arxiv:{PAPER}']{data}
# license: to be set by whoever publishes the model; it depends on the training data
---
"""


def _summary(about: dict, names: dict[str, str], vae: dict) -> str:
    latents, (_, channels, height, width) = about["latents"], about["latents"]["shape"]
    side = latents["key"]["image_size"]
    shown = ", ".join(list(names.values())[:10]) + (", ..." if len(names) > 10 else "")
    kind = f"{'Class-conditional' if names else 'Unconditional'} {_NETWORKS[about['config']['model']['variant']]}"
    return f"""# {kind} on vector-quantized latents

{about["parameters"] / 1e6:.1f} M parameters, trained in the latent space of a frozen image tokenizer
({vae["num_vq_embeddings"]} codes of {vae["vq_embed_dim"]} dimensions). The tokenizer's
decoder quantizes what it samples.

- Images: {side} x {side} pixels; latents: {height} x {width} x {channels}
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


def _training(about: dict, conditional: bool) -> str:
    config, latents = about["config"], about["latents"]
    optim, run, key = config["optim"], config["run"], latents["key"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    views = "ADM's centre crop" + (f" and {key['crops'] - 1} of its random crops" if key["crops"] > 1 else "")
    views += ", and the mirror image of each" if key["flips"] == 2 else ""
    dropped = f"; labels dropped with probability {config['model']['class_dropout']:g}" if conditional else ""
    return f"""## Training

- Steps: {about["step"]}; batch {run["batch_size"]}; {about["samples_seen"]} samples seen
- Optimizer: AdamW, learning rate {optim["lr"]:g}, betas {tuple(optim["betas"])}, weight decay
  {optim["weight_decay"]:g}, gradient norm at most {optim["clip_grad_norm"]:g}, {optim["warmup_steps"]} warm-up steps;
  mixed precision: {run["mixed_precision"]}; averaged weights with decay {optim["ema_decay"]:g}
- Objective: {about["objective"]}{dropped}
- Images: {views}; {latents["bad_images"]} images did not decode and were left out
- Latents: {key["latents"]}; over the training set, as the network sees them: overall deviation
  {latents["overall_std"]:.4f}; deviation of a channel {min(latents["std"]):.4f} to
  {max(latents["std"]):.4f}; largest mean of a channel {max(map(abs, latents["mean"])):.4f}
- Tokenizer: {_tokenizer(about.get("tokenizer"))}SHA-256 {latents["key"]["tokenizer"]}
- Software: nsvq {about["nsvq"]}, {versions}; all settings are in `nsvq.json`
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
        counts, data = result["counts"], result["data"]
        number = f"{counts['samples']} samples" if "samples" in counts else f"{counts['images']} images"
        what = f"Protocol `{result['protocol']}`: {number}, {data['split']} split of `{data['source']}`"
        if setting := result.get("setting"):
            what += f", guidance {setting['guidance_scale']:g}, {setting['steps']} steps, {result['seeds']}"
        lines += [f"### {heading}", "", f"{what}; nsvq {result['versions']['nsvq']}.", "", "| | | |", "|---|---|---|"]
        lines += [f"| {name} | {number} | {note} |" for name, number, note in table_rows(result)]
        lines += ["", f"    {result['command']}", "", *(f"Warning: {warning}\n" for warning in result["warnings"])]
    return "\n".join(lines)


def table_rows(result: dict) -> list[tuple[str, str, str]]:
    """(name, number, meaning) of each number of a result, as read from its JSON file, and of what it skipped."""
    numbers = {name: "-" if value is None else f"{value:.5g}" for name, value in result["metrics"].items()}
    rows = [(name, number, result["meanings"].get(name, "")) for name, number in numbers.items()]
    return rows + [(name, "skipped", why) for name, why in result["skipped"].items()]


def _limits(classes: int, scheduler: str) -> str:
    knows = f"its {classes} classes at its" if classes else "its"
    guided = "uses guidance only for `guidance_scale` > 1, takes class ids, and " if classes else ""
    steps = "in at most about 300 steps: its scheduler's timesteps are integers from 0 to 1000"
    if scheduler == "DDIMScheduler":
        steps = "in numbers of steps that divide 1000"
    return f"""## Limits

- It knows {knows} one image size, with the biases of its training data. Samples do not show real
  people, places or events, and must not be passed off as such.
- An image's detail is bounded by the tokenizer: see its reconstruction figures.
- The stock pipeline {guided}samples {steps}.
"""
