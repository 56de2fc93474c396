"""Our DiT against diffusers' `DiTTransformer2DModel` at equal size: a training step, and guided sampling.

python benchmarks/dit.py                                             # S and B on 16 x 16 x 128 latents, batch 8
python benchmarks/dit.py --sizes S --dtypes bfloat16 --rounds 9 --compile
A step is forward, loss, backward and fused AdamW, with float32 weights under autocast to the given type. Sampling is
50 steps at guidance 2 of `ClassConditionalPipeline` and of stock `DiTPipeline` from the same exported weights, in the
given type on both sides, without decoding. Both sides are compiled, or neither. Each has a process of its own, and they
take turns; a time is the median of the rounds, a ratio the median of ratios, memory the peak, weights and all.
On a CPU our process keeps freed memory, as those of our trainers and samplers do; --stock_keeps_memory gives the stock
one this too.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from diffusers import DiTPipeline, VQModel
from measure import Elsewhere, interleaved, machine, ratio, serve

from nsvq.common.launch import keep_freed_memory
from nsvq.diffusion.dit import DiT
from nsvq.diffusion.model import SIZES, DiTConfig, make_model
from nsvq.diffusion.samplers import flow_scheduler
from nsvq.pipelines.export import from_stock, to_stock
from nsvq.pipelines.pipeline import ClassConditionalPipeline

SHAPE, CLASSES = (128, 16, 16), 1000
SIDES = ("ours", "stock")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["S", "B"])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--tasks", nargs="+", choices=["training", "sampling"], default=["training", "sampling"])
    parser.add_argument("--batch", type=int, default=8, help="samples; guidance doubles them")
    parser.add_argument("--steps", type=int, default=50, help="of sampling")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stock_keeps_memory", action="store_true", help="as ours does")
    parser.add_argument("--side", choices=SIDES, help="be the process of this side of one task")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.side:
        serve_side(options.side, options.tasks[0], options.sizes[0], options.dtypes[0], options, device)
        return

    print(
        f"{machine(device)}; latents 128 x 16 x 16, batch {options.batch}, {options.rounds} rounds"
        f"{', compiled' if options.compile else ''}\n"
    )
    print("| size | dtype | task | s ours | s stock | times stock | GiB ours | GiB stock |\n" + "|---" * 8 + "|")
    for size in options.sizes:
        for dtype in options.dtypes:
            for task in options.tasks:
                chosen = {
                    "tasks": task,
                    "sizes": size,
                    "dtypes": dtype,
                    "batch": options.batch,
                    "steps": options.steps,
                    "device": options.device,
                    "compile": options.compile,
                    "stock_keeps_memory": options.stock_keeps_memory,
                }
                sides = {side: Elsewhere(chosen | {"side": side}) for side in SIDES}
                seconds = interleaved(sides, options.rounds, device)
                ours, stock = (statistics.median(seconds[side]) for side in SIDES)
                memory = [sides[side].peak / 2**30 for side in SIDES]
                print(
                    f"| {size} | {dtype} | {task} | {ours:.3f} | {stock:.3f} | "
                    f"{ratio(seconds['ours'], seconds['stock']):.3f} | {memory[0]:.2f} | {memory[1]:.2f} |",
                    flush=True,
                )
                for side in sides.values():
                    side.close()


def serve_side(side: str, task: str, size: str, dtype: str, options, device: torch.device) -> None:
    def make() -> Callable[[], None]:
        way = make_way(task, side, size, dtype, options, device)
        if side == "ours" or options.stock_keeps_memory:
            keep_freed_memory(device.type)
        return way

    # After the second step, optimizers hold their moments.
    serve(make, device, calls=2 if task == "training" else 1)


def make_way(task: str, side: str, size: str, dtype: str, options, device: torch.device) -> Callable[[], None]:
    """A call that trains one step, or samples once."""
    torch.manual_seed(0)
    model = make_model(DiTConfig(size=size), SHAPE, CLASSES)
    for parameter in model.parameters():  # at initialisation a DiT is the identity, and zero
        torch.nn.init.normal_(parameter, std=0.02)
    if task == "training":
        return training_step(model if side == "ours" else to_stock(model).train(), dtype, options, device)
    return sampler(to_stock(model), side, dtype, options, device)


def training_step(network: torch.nn.Module, dtype: str, options, device: torch.device) -> Callable[[], None]:
    network.to(device)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
    latents, noise = (torch.randn(options.batch, *SHAPE, device=device) for _ in range(2))
    time = torch.randint(0, 1000, (options.batch,), device=device)
    labels = torch.randint(0, CLASSES, (options.batch,), device=device)
    ours = isinstance(network, DiT)
    if options.compile:
        network.compile()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            x = (latents + noise) / 2
            output = network(x, time, labels) if ours else network(x, timestep=time, class_labels=labels).sample
        (output.float() - (noise - latents)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def sampler(stock: torch.nn.Module, side: str, dtype: str, options, device: torch.device) -> Callable[[], None]:
    vae = VQModel(latent_channels=SHAPE[0], vq_embed_dim=SHAPE[0], num_vq_embeddings=16, block_out_channels=(32,))
    vae.decode = lambda latents: argparse.Namespace(sample=latents[:, :3])  # decoding costs both the same
    pipeline_class, network = DiTPipeline, stock
    if side == "ours":  # as from_pretrained does
        pipeline_class, network = ClassConditionalPipeline, from_stock(stock)
    pipeline = pipeline_class(network, vae, flow_scheduler(2.83), {i: str(i) for i in range(CLASSES)})
    torch.nn.Module.to(pipeline.transformer, device=device, dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    if options.compile:
        pipeline.transformer.compile()
    labels = list(range(options.batch))
    return lambda: pipeline(
        labels,
        guidance_scale=2.0,
        num_inference_steps=options.steps,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )


if __name__ == "__main__":
    main()
