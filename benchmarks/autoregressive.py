"""Our autoregressive stage against stock `LlamaForCausalLM` of the same weights: a training step, the loss alone, and
guided sampling.

python benchmarks/autoregressive.py                                  # tiny and B, 256 tokens, batch 4
python benchmarks/autoregressive.py --sizes B --tasks sampling --peers generate --rounds 3
A step is forward, loss, backward and fused AdamW; its peer is the dense loss of the model itself. The loss alone is
forward and backward from the last layer's output at K = 65,536; its peer keeps the logits. Sampling is at guidance 2;
its peers are `generate` with its default cache, and a loop that has none (uncached). Each side has a process of its
own, and they take turns; a time is the median of the rounds, a ratio the median of ratios, memory the peak, weights and
all. On a CPU the processes keep freed memory, as our trainers and samplers do, but for the loss alone: the heap's gaps
would hide what it needs.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import Elsewhere, interleaved, machine, ratio, serve
from torch import Tensor

from nsvq.autoregressive.model import SIZES, ModelConfig, NextToken, chunked_cross_entropy, make_llama
from nsvq.autoregressive.sampling import draw_uniforms, sample
from nsvq.common.launch import keep_freed_memory

CLASSES, LARGE = 1000, 65_536
PEERS = {"training": ("dense",), "loss": ("dense",), "sampling": ("generate", "uncached")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "B"])
    parser.add_argument("--tasks", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--peers", nargs="+", choices=["dense", "generate", "uncached"], help="only these")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="float32", help="of autocast, or of samplers"
    )
    parser.add_argument("--batch", type=int, default=4, help="images; guidance doubles them")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--codes", type=int, default=16_384, help="K; the loss alone has 65,536")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", choices=["ours", "dense", "generate", "uncached"], help="be the process of this side")
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.side:
        # After the second step, optimizers hold their moments.
        serve(lambda: make_way(options, device), device, calls=2 if options.tasks == ["training"] else 1)
        return

    shape = f"{options.batch} images of {options.tokens} tokens, K = {options.codes}, {options.dtype}"
    print(f"{machine(device)}; {shape}, {options.rounds} rounds\n")
    print(
        "| size | task | peer | s ours | s peer | times peer | GiB ours | GiB peer | times peer |\n" + "|---" * 9 + "|"
    )
    for size in options.sizes:
        for task in options.tasks:
            wanted = [peer for peer in PEERS[task] if peer in (options.peers or PEERS[task])]
            compare(size, task, wanted, options, device)


def compare(size: str, task: str, peers: list[str], options: argparse.Namespace, device: torch.device) -> None:
    shared = {name: getattr(options, name) for name in ("dtype", "batch", "tokens", "codes", "device")}
    chosen = {"sizes": size, "tasks": task, **shared}
    sides = {side: Elsewhere(chosen | {"side": side}) for side in ("ours", *peers)}
    seconds = interleaved(sides, options.rounds, device)
    times = {side: statistics.median(seconds[side]) for side in sides}
    memory = {side: sides[side].peak / 2**30 for side in sides}
    for peer in peers:
        print(
            f"| {size} | {task} | {peer} | {times['ours']:.2f} | {times[peer]:.2f} | "
            f"{ratio(seconds['ours'], seconds[peer]):.2f} | {memory['ours']:.2f} | {memory[peer]:.2f} | "
            f"{memory['ours'] / memory[peer]:.2f} |",
            flush=True,
        )
    for side in sides.values():
        side.close()


def make_way(options: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    """A call that trains one step, computes the loss and its gradient, or samples once."""
    torch.manual_seed(0)
    (task,), (size,) = options.tasks, options.sizes
    if task == "loss":
        return loss_way(options.side == "ours", ModelConfig(size=size).dimensions()[1], options, device)
    keep_freed_memory(device.type)
    llama = make_llama(ModelConfig(size=size), options.codes, CLASSES, options.tokens)
    torch.nn.init.normal_(llama.lm_head.weight, std=0.02)
    return {"training": training_way, "sampling": sampling_way}[task](options.side, llama.to(device), options, device)


def loss_way(ours: bool, width: int, options: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    rows = options.batch * options.tokens
    dtype = getattr(torch, options.dtype)  # that of the logits under autocast
    hidden, table = (torch.randn(n, width, device=device, dtype=dtype).requires_grad_() for n in (rows, LARGE))
    targets = torch.randint(LARGE, (rows,), device=device)

    def dense() -> Tensor:
        return F.cross_entropy(F.linear(hidden, table).float(), targets)

    def way() -> None:
        hidden.grad = table.grad = None
        (chunked_cross_entropy(hidden, table, targets) if ours else dense()).backward()

    return way


def training_way(side: str, llama, options: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    ids = torch.randint(options.codes, options.codes + CLASSES, (options.batch,), device=device)
    codes = torch.randint(options.codes, (options.batch, options.tokens), device=device)
    sequence = torch.cat([ids[:, None], codes], dim=1)
    labels = torch.cat([torch.full_like(ids, -100)[:, None], codes], dim=1)
    network = NextToken(llama, options.codes)
    optimizer = torch.optim.AdamW(llama.parameters(), 1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            loss = network(ids, codes) if side == "ours" else llama(sequence, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def sampling_way(side: str, llama, options: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    llama.eval().to(getattr(torch, options.dtype))
    ids = torch.arange(options.batch, device=device) + options.codes
    null = torch.full_like(ids, llama.config.vocab_size - 1)
    uniforms = torch.stack([draw_uniforms(options.tokens, None) for _ in ids]).to(device)
    if side == "ours":
        return lambda: sample(llama, options.codes, ids, uniforms, guidance_scale=2.0)
    if side == "generate":
        mask = torch.ones_like(ids)[:, None]
        return lambda: llama.generate(
            ids[:, None], attention_mask=mask, guidance_scale=2.0, negative_prompt_ids=null[:, None]
        )

    @torch.no_grad()
    def uncached() -> Tensor:
        sequence = torch.cat([ids, null])[:, None]
        for _ in range(options.tokens):
            logits = llama(sequence, use_cache=False).logits[:, -1, : options.codes].float()
            main, base = logits.chunk(2)
            drawn = (base + 2.0 * (main - base)).softmax(1).multinomial(1)
            sequence = torch.cat([sequence, drawn.repeat(2, 1)], dim=1)
        return sequence

    return uncached


if __name__ == "__main__":
    main()
