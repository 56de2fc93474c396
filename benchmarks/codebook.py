"""The codebook engine against what others search with, and the NS loss against its dense formula.

pip install --editable '.[bench]'
python benchmarks/codebook.py                                        # every size; about 25 minutes on 2 cores
python benchmarks/codebook.py --sizes 65536 --dims 8 128 --rounds 7
Prints two Markdown tables. Ways are interleaved; a time is the median of the rounds, a ratio the median of ratios.
"""

import argparse
import statistics

import torch
from diffusers.models.autoencoders.vae import VectorQuantizer
from measure import interleaved, machine, matmul_rate, of_bench, peak_memory, ratio

from nsvq.common import launch
from nsvq.tokenizer.codebook import nearest_code, nonstationary_loss, search_with_nonstationary_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 16_384, 65_536, 262_144, 1_048_576], help="K")
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 32, 128], help="d")
    parser.add_argument("--latents", type=int, default=8192, help="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory_limit", type=float, default=8.0, help="GiB; a way that would need more is left out")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)

    print(f"{machine(device)}; N = {options.latents}, {options.rounds} rounds, float32\n")
    searches, losses = [], []
    for size in options.sizes:
        for dim in options.dims:
            z, codebook = (torch.randn(n, dim, device=device) for n in (options.latents, size))
            matrices = options.memory_limit * 2**30 / (4 * options.latents * size)  # N x K ones that fit
            searches += compare_searches(z, codebook, matrices, options.rounds)
            losses += compare_losses(z, codebook, matrices, options.rounds)
    print("| K | d | search | ms | times ours | MiB | of the matrix rate |\n|---|---|---|---|---|---|---|")
    print("\n".join(searches))
    print("\n| K | d | NS loss and gradient | ms | times nearest_code | MiB |\n|---|---|---|---|---|---|")
    print("\n".join(losses))


def compare_searches(z: torch.Tensor, codebook: torch.Tensor, matrices: float, rounds: int) -> list[str]:
    """Rows of the first table. faiss and the modules hold the codebook as their own."""
    faiss, peers = of_bench("faiss"), of_bench("vector_quantize_pytorch")
    size, dim = codebook.shape
    ways = {"nearest_code (ours)": lambda: nearest_code(z, codebook)}
    if matrices >= 2:
        ways["torch.cdist(...).argmin"] = lambda: torch.cdist(z, codebook).argmin(1)
        stock = VectorQuantizer(size, dim, beta=0.25).to(z.device)
        stock.embedding.weight.data.copy_(codebook)
        image = z.T.reshape(1, dim, -1, 1)
        ways["diffusers VectorQuantizer"] = torch.no_grad()(lambda: stock(image))
    if matrices >= 4:
        peer = peers.VectorQuantize(dim=dim, codebook_size=size).to(z.device).eval()
        peer._codebook.embed.data.copy_(codebook[None])
        ways["vector-quantize-pytorch"] = torch.no_grad()(lambda: peer(z[None]))
    if z.device.type == "cpu":
        index = faiss.IndexFlatL2(dim)
        index.add(codebook.numpy())
        ways["faiss IndexFlatL2"] = lambda: index.search(z.numpy(), 1)
    memory = {name: peak_memory(way, z.device) for name, way in ways.items()}
    seconds = interleaved(ways | {"matmul": matmul_rate(z.device)}, rounds, z.device)
    rows, ours = [], seconds["nearest_code (ours)"]
    for name in ways:
        share = 2 * len(z) * size * dim / (2 * 4096**3) / ratio(seconds[name], seconds["matmul"])
        rows.append(
            f"| {size:,} | {dim} | {name} | {1e3 * statistics.median(seconds[name]):.1f} | "
            f"{ratio(seconds[name], ours):.2f} | {memory[name] / 2**20:.0f} | {share:.0%} |"
        )
    print("\n".join(rows), flush=True)
    return rows


def compare_losses(z: torch.Tensor, codebook: torch.Tensor, matrices: float, rounds: int) -> list[str]:
    """Rows of the second table: the loss with its gradient to the codebook, the search included or not."""
    size, dim, tau = *codebook.shape, 0.35
    codebook = codebook.clone().requires_grad_()
    indices = nearest_code(z, codebook)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, codebook)[0]

    def dense() -> torch.Tensor:
        distances = torch.cdist(z, codebook).square()
        weights = (distances / -tau).softmax(1).detach().scatter(1, indices[:, None], 0.0)
        return gradient((weights * distances).sum() / z.numel())

    ways = {
        "nearest_code": lambda: nearest_code(z, codebook),
        "search_with_nonstationary_loss": lambda: gradient(search_with_nonstationary_loss(z, codebook, tau)[1].loss),
        "nonstationary_loss": lambda: gradient(nonstationary_loss(z, codebook, indices, tau).loss),
    }
    if matrices >= 7:
        ways["dense formula, no search"] = dense
    memory = {name: peak_memory(way, z.device) for name, way in ways.items()}
    seconds = interleaved(ways, rounds, z.device)
    rows = [
        f"| {size:,} | {dim} | {name} | {1e3 * statistics.median(seconds[name]):.1f} | "
        f"{ratio(seconds[name], seconds['nearest_code']):.2f} | {memory[name] / 2**20:.0f} |"
        for name in ways
    ]
    print("\n".join(rows), flush=True)
    return rows


if __name__ == "__main__":
    launch.run(main)
