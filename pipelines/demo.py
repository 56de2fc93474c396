"""Look at a pipeline and at tokenizers in a browser, without a network: generate, reconstruct, edit, interpolate.

python pipelines/demo.py --pipeline runs/dit-b/pipeline --tokenizer runs/nsvq/tokenizer runs/vq/tokenizer
"""

import base64
import io
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from pydantic import Field

from nsvq.common import config as configs
from nsvq.common import launch
from nsvq.common.image_metrics import to_uint8
from nsvq.data.config import Config
from nsvq.data.images import BadImage
from nsvq.data.images import decode as decode_file
from nsvq.data.synthetic import render
from nsvq.diffusion.samplers import sampler_names
from nsvq.errors import UsageError, UserError
from nsvq.pipelines import explore
from nsvq.pipelines.explore import Pipeline, picture
from nsvq.pipelines.pipeline import ClassConditionalPipeline
from nsvq.tokenizer.pretrained import Tokenizer

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
try:
    import gradio as gr
except ImportError:
    gr = None

Tokenizers = dict[str, Tokenizer]
_CODES_SHOWN = 96
_COLUMNS = 4
_EXAMPLES = 99  # the last synthetic one
# Events that run a model wait for each other: a pipeline's scheduler has a state.
_MODEL = {"concurrency_id": "model", "concurrency_limit": 1}


class DemoConfig(Config):
    """A page in the browser for a pipeline and for tokenizers; the tabs of what is not given are not there."""

    pipeline: Path | None = Field(None, description="Folder of a pipeline (<out>/pipeline).")
    tokenizer: list[str] = Field([], description="Folders of tokenizers (<out>/tokenizer), or their Hub ids.")
    host: str = Field("127.0.0.1", description="Address to listen at; 0.0.0.0 lets the whole network in.")
    port: int | None = Field(None, ge=1, le=65535, description="Its port; null is the first free one from 7860.")
    device: str | None = Field(None, description="Such as cpu or cuda:1; null is a GPU where there is one.")


def main() -> None:
    config = configs.parse(DemoConfig, sys.argv[1:])
    if gr is None:
        wheel = "elsewhere 'nsvq[demo] @ file:///PATH/TO/WHEEL'"
        raise UserError(f"the demo needs Gradio: pip install --editable '.[demo]' in a clone, {wheel}")
    if config.pipeline is None and not config.tokenizer:
        raise UsageError("there is nothing to show: give --pipeline DIR, --tokenizer DIR ..., or both")
    pipeline = None
    if config.pipeline is not None:
        if not (config.pipeline / "model_index.json").is_file():
            raise UserError(f"no pipeline at {config.pipeline}: give the <out>/pipeline folder of a finished run")
        pipeline = ClassConditionalPipeline.from_pretrained(config.pipeline)
    tokenizers = {folder: Tokenizer.from_pretrained(folder) for folder in config.tokenizer}
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for model in filter(None, [pipeline, *tokenizers.values()]):
        model.to(device)
    launch.keep_freed_memory(device.type)
    try:
        serve(build(pipeline, tokenizers), server_name=config.host, server_port=config.port)
    except OSError:
        raise UserError(f"port {config.port or 7860} of {config.host} is taken: give another --port") from None


def serve(page: "gr.Blocks", **how) -> str:
    """Show the page, and return its address where `prevent_thread_lock` is given; else stay until it is stopped."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no download
    how |= {"theme": theme, "share": False, "ssr_mode": False, "footer_links": [], "show_error": True}
    return page.launch(**how)[1]


def build(pipeline: Pipeline | None, tokenizers: Tokenizers) -> "gr.Blocks":
    """The page, with the tabs of what there is."""
    day = 86_400  # seconds
    with gr.Blocks(title="nsvq", analytics_enabled=False, delete_cache=(day, day)) as page:
        gr.Markdown("# nsvq\nA generator and tokenizers, seen from inside.")
        if pipeline is not None:
            pipeline.set_progress_bar_config(disable=True)
            with gr.Tab("Generate"):
                _generate(pipeline)
        if tokenizers:
            with gr.Tab("Reconstruct"):
                _reconstruct(page, tokenizers)
            with gr.Tab("Edit tokens"):
                _edit(page, tokenizers)
            with gr.Tab("Between images"):
                _between_images(tokenizers)
        if isinstance(pipeline, ClassConditionalPipeline):  # an autoregressive one starts from no noise
            with gr.Tab("Between seeds"):
                _between_seeds(pipeline)
        if tokenizers:
            with gr.Tab("Codebook"):
                _codebook(tokenizers)
    return page


def _generate(pipeline: Pipeline) -> None:
    settings = _settings(pipeline)
    with gr.Row():
        with gr.Column(min_width=300):
            classes = _classes(pipeline, multiselect=True, max_choices=8)
            count = gr.Slider(1, 8, 4, step=1, label="Images of each class")
            seed = _seed("First seed", 0)
            every = gr.Slider(0, 64, 8, step=1, label="Preview", info="Every so many steps; 0: at the end alone.")
            for setting in settings.values():
                setting.render()
        with gr.Column(min_width=300):
            with gr.Row():
                start, stop = gr.Button("Generate", variant="primary"), gr.Button("Stop")
            result = _picture("Samples")
            said = gr.Markdown()

    def run(classes: list, count: int, seed: int, every: int, *values) -> Iterator:
        chosen = (classes or [None]) if pipeline.id2label else [None]
        labels = [label for label in chosen for _ in range(int(count))]
        seeds = [int(seed) + i for _ in chosen for i in range(int(count))]
        how = _arguments(settings, values) | {"seeds": seeds}
        rows = ", ".join("no class" if label is None else pipeline.id2label[label] for label in chosen)
        for step, images in explore.generate(pipeline, labels, int(every), **how):
            about = f"Step {step}. Rows: {rows}. Columns: seeds {seeds[0]} to {seeds[-1]}."
            yield picture(images, int(count)), about

    running = start.click(run, [classes, count, seed, every, *settings.values()], [result, said], **_MODEL)
    stop.click(None, cancels=running)


def _settings(pipeline: Pipeline) -> "dict[str, gr.components.Component]":
    """{argument of the pipeline: its input}, which is not on the page yet."""
    slider = partial(gr.Slider, render=False)
    guidance = slider(0, 10, 2.0, step=0.1, label="Guidance", info="1 is none.")
    if not isinstance(pipeline, ClassConditionalPipeline):
        schedules = ["constant", "linear", "cosine"]
        return {
            "guidance_scale": guidance,
            "guidance_schedule": gr.Dropdown(schedules, label="Rise of guidance over the tokens", render=False),
            "temperature": slider(0, 2, 1.0, step=0.05, label="Temperature", info="0 takes the likeliest code."),
            "top_k": slider(0, pipeline.vae.config.num_vq_embeddings, 0, step=1, label="Top k", info="0: all codes."),
            "top_p": slider(0.01, 1, 1.0, step=0.01, label="Top p", info="1: all codes."),
        }
    samplers = [("the pipeline's own", ""), *sampler_names(pipeline.scheduler)]
    return {
        "num_inference_steps": slider(1, 250, 25, step=1, label="Steps"),
        "sampler": gr.Dropdown(samplers, label="Sampler", render=False),
        "guidance_scale": guidance,
        "low": slider(0, 1, 0.0, step=0.05, label="Guidance from noise level"),
        "high": slider(0, 1, 1.0, step=0.05, label="Guidance up to noise level"),
    }


def _arguments(settings: dict, values: tuple) -> dict:
    """What the inputs of `_settings` hold, as the pipeline's arguments."""
    how = dict(zip(settings, values, strict=True))
    if "sampler" in how:
        how |= {"guidance_interval": (how.pop("low"), how.pop("high")), "sampler": how["sampler"] or None}
    return how


def _reconstruct(page: "gr.Blocks", tokenizers: Tokenizers) -> None:
    image = _image_input("Image", 5)
    shown: list = []
    for name in tokenizers:
        gr.Markdown(f"### {name}")
        with gr.Row():
            titles = ("Original", "Reconstruction", "Difference, times 4", "Tokens")
            shown += [_picture(title) for title in titles]
        shown.append(gr.Markdown())
    gr.Markdown("Tokens of like colours have codes that are near in the codebook.")

    def run(image: Image.Image | None) -> list:
        if image is None:
            return [None] * len(shown)
        found: list = []
        for tokenizer in tokenizers.values():
            result = explore.reconstruct(tokenizer, image)
            tokens = explore.token_map(tokenizer, result.codes)
            found += [picture(part) for part in (result.original, result.image, result.difference, tokens)]
            codes, counts = result.codes.unique(return_counts=True)
            most = ", ".join(str(codes[i].item()) for i in counts.argsort(descending=True, stable=True)[:8])
            used = f"{len(codes)} of {tokenizer.codebook_size:,} codes in {result.codes.numel()} tokens"
            found.append(f"PSNR {result.psnr:.2f} dB. {used}, most often {most}.")
        return found

    gr.on([page.load, image.change], run, image, shown, **_MODEL)


def _edit(page: "gr.Blocks", tokenizers: Tokenizers) -> None:
    last_row, last_code = (
        max(map(_side, tokenizers.values())) - 1,
        max(t.codebook_size for t in tokenizers.values()) - 1,
    )
    state = gr.State()  # (name of the tokenizer, the encoder's codes, the edited ones)
    name = _choice(tokenizers)
    with gr.Row():
        image = _image_input("Image", 8)
        tokens, decoded = _picture("Tokens: click one"), _picture("Decoded")
    said = gr.Markdown()
    with gr.Row():
        row, column = (gr.Slider(0, last_row, 0, step=1, label=label, min_width=120) for label in ("Row", "Column"))
        code = gr.Slider(0, last_code, 0, step=1, label="Code", min_width=120)
        paint = gr.Checkbox(label="A click sets the code", min_width=120)
    with gr.Row():
        put, reset = gr.Button("Set code", variant="primary", min_width=120), gr.Button("Reset", min_width=120)
    with gr.Row():
        one, other = (gr.Slider(0, last_code, 0, step=1, label=label, min_width=120) for label in ("Swap", "with"))
        swap = gr.Button("Swap everywhere", min_width=120)
    outputs, place = [state, tokens, decoded, said], [row, column]

    def show(name: str, first: torch.Tensor, codes: torch.Tensor, row: int, column: int) -> list:
        tokenizer = tokenizers[name]
        shown = picture(explore.token_map(tokenizer, codes))
        there, side = "", shown.height // len(codes)  # of a token
        if row < codes.shape[0] and column < codes.shape[1]:
            box = (column * side, row * side, (column + 1) * side - 1, (row + 1) * side - 1)
            ImageDraw.Draw(shown).rectangle(box, outline="white", width=max(2, side // 8))
            there = f"Row {row}, column {column}: code {codes[row, column]}. "
        changed = f"{(codes != first).sum()} of {codes.numel()} tokens changed."
        return [(name, first, codes), shown, picture(explore.decode(tokenizer, codes)), there + changed]

    def start(name: str, image: Image.Image | None, row: int, column: int) -> list:
        if image is None:
            return [None] * len(outputs)
        codes = explore.encode(tokenizers[name], image)
        return show(name, codes, codes, row, column)

    def change(edit: Callable, state: tuple | None, row: int, column: int, *values) -> list:
        if state is None:
            raise UsageError("choose an image first")
        name, first, codes = state
        most = tokenizers[name].codebook_size - 1
        if any(value > most for value in values):
            raise UsageError(f"the codes of {name} are 0 to {most}")
        return show(name, first, edit(codes, row, column, *values), row, column)

    def clicked(event: gr.SelectData, state: tuple, image: Image.Image, paint: bool, code: int) -> list:
        name, first, codes = state
        side = image.height // len(codes)
        column, row = (int(at) // side for at in event.index)
        edited = change(explore.set_code, state, row, column, code) if paint else show(name, first, codes, row, column)
        return [row, column, *edited]

    gr.on([page.load, image.change, name.change], start, [name, image, *place], outputs, **_MODEL)
    put.click(partial(change, explore.set_code), [state, *place, code], outputs, **_MODEL)
    swap.click(
        partial(change, lambda codes, _, __, *pair: explore.swap_codes(codes, *pair)),
        [state, *place, one, other],
        outputs,
        **_MODEL,
    )
    reset.click(start, [name, image, *place], outputs, **_MODEL)
    tokens.select(clicked, [state, tokens, paint, code], [*place, *outputs], **_MODEL)


def _between_images(tokenizers: Tokenizers) -> None:
    name = _choice(tokenizers)
    with gr.Row():
        one, other = _image_input("From", 5), _image_input("To", 8)
    count = gr.Slider(2, 16, 8, step=1, label="Images")
    start, result = gr.Button("Interpolate", variant="primary"), _picture("Latents between, quantized and decoded")

    def run(name: str, one: Image.Image | None, other: Image.Image | None, count: int) -> Image.Image:
        if one is None or other is None:
            raise UsageError("choose two images first")
        return picture(explore.between_images(tokenizers[name], one, other, int(count)), _COLUMNS)

    start.click(run, [name, one, other, count], result, **_MODEL)


def _between_seeds(pipeline: ClassConditionalPipeline) -> None:
    settings = _settings(pipeline)
    with gr.Row():
        with gr.Column(min_width=300):
            label = _classes(pipeline)
            with gr.Row():
                one, other = _seed("From seed", 0), _seed("To seed", 1)
            count = gr.Slider(2, 16, 8, step=1, label="Images")
            for setting in settings.values():
                setting.render()
        with gr.Column(min_width=300):
            start, result = gr.Button("Interpolate", variant="primary"), _picture("Noise between")

    def run(label: int | None, one: int, other: int, count: int, *values) -> Image.Image:
        how = _arguments(settings, values)
        images = explore.between_seeds(pipeline, label, (int(one), int(other)), int(count), **how)
        return picture(images, _COLUMNS)

    start.click(run, [label, one, other, count, *settings.values()], result, **_MODEL)


def _codebook(tokenizers: Tokenizers) -> None:
    name = _choice(tokenizers)
    with gr.Row():
        files = gr.File(label="Images", file_count="multiple", file_types=["image"], height=140)
        count = gr.Slider(1, 256, 64, step=1, label="Synthetic images", info="Where no file is given.")
        most = max(tokenizer.codebook_size for tokenizer in tokenizers.values())
        first = gr.Slider(1, most, 1, step=1, label="From rank", info="1 is the most used code.")
    start, said = gr.Button("Look", variant="primary"), gr.Markdown()
    shown = gr.HTML()

    def run(name: str, files: list[str] | None, count: int, first: int) -> tuple:
        tokenizer = tokenizers[name]
        images = _opened(files) if files else [render("test", i, tokenizer.image_size) for i in range(int(count))]
        use = explore.code_use(tokenizer, images)
        chosen = slice(int(first) - 1, int(first) - 1 + _CODES_SHOWN)
        share = f"{len(use.codes):,} of {tokenizer.codebook_size:,} codes in {use.counts.sum():,} tokens"
        about = f"{share} of {len(images)} images; perplexity {use.perplexity:,.0f}."
        return f"{about} Below each code's mean patch: its number, and how often it is used.", _table(use, chosen)

    start.click(run, [name, files, count, first], [said, shown], **_MODEL)


def _table(use: explore.CodeUse, chosen: slice) -> str:
    """HTML that fills rows of any width, which Gradio's gallery does not."""
    cells = []
    for code, count, patch in zip(*(column[chosen] for column in use), strict=True):
        file = io.BytesIO()
        Image.fromarray(to_uint8(2 * patch - 1).permute(1, 2, 0).numpy()).save(file, "PNG")
        source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        look = "width: 64px; height: 64px; image-rendering: pixelated"
        cells.append(f'<div><img src="{source}" alt="code {code}" style="{look}">{code}<br>{count} times</div>')
    return f'<div style="display: flex; flex-wrap: wrap; gap: 12px; font-size: 13px">{"".join(cells)}</div>'


def _opened(files: list[str]) -> list[Image.Image]:
    try:
        return [decode_file(Path(file).read_bytes(), Path(file).name) for file in files]
    except BadImage as error:
        raise UserError(f"{error}: leave it out") from None


def _image_input(label: str, example: int) -> "gr.Image":
    """An image to upload or paste, or a synthetic one by its number, which is what it starts with."""
    with gr.Column(min_width=150):
        image = _picture(
            label, render("test", example, 256), interactive=True, sources=["upload", "clipboard"], height=300
        )
        number = gr.Slider(0, _EXAMPLES, example, step=1, label="Synthetic example")
        number.release(lambda i: render("test", int(i), 256), number, image)
    return image


def _picture(label: str, value: Image.Image | None = None, **options) -> "gr.Image":
    """Its label stands above it, since Gradio's would cover a corner, and so some tokens. As PNG: WebP, the default,
    would change the pixels. `image_mode` None leaves it to `to_rgb`."""
    how = {"type": "pil", "format": "png", "image_mode": None, "show_label": False, "buttons": [], "interactive": False}
    with gr.Column(min_width=150):
        gr.Markdown(label)
        return gr.Image(value, label=label, alt_text=label, **(how | options))


def _choice(tokenizers: Tokenizers) -> "gr.Dropdown":
    return gr.Dropdown(list(tokenizers), label="Tokenizer", visible=len(tokenizers) > 1)


def _classes(pipeline: Pipeline, **options) -> "gr.Dropdown":
    """Classes by name; their ids are what is given. Not there where the model has none."""
    choices = [(f"{i}: {name}", i) for i, name in pipeline.id2label.items()]
    first = next(iter(pipeline.id2label), None)
    value = list(pipeline.id2label)[:4] if options else first
    return gr.Dropdown(choices, value=value, label="Class", visible=bool(choices), **options)


def _seed(label: str, value: int) -> "gr.Slider":
    return gr.Slider(0, 9999, value, step=1, label=label, min_width=120)


def _side(tokenizer: Tokenizer) -> int:
    return tokenizer.image_size // tokenizer.downsampling


if __name__ == "__main__":
    launch.run(main)
