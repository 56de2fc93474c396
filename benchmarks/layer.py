"""`VectorQuantizer` and `ResidualVectorQuantizer` beside vector-quantize-pytorch, in the same training loops.

pip install --editable '.[bench]'
python benchmarks/layer.py                                      # about 12 minutes on one core that is free
python benchmarks/layer.py --codebook_size 512 --steps 150      # a minute or two

Prints a Markdown table. `use`: codes that won one of 65,536 tokens in evaluation after the last step; `lowest`: those
that won one of the last 32 tokens per code in training, at its worst after the first fifth; `error`: mean squared error
of test data over their variance. Layers take turns; times are medians, and a ratio is the median of ratios."""

import argparse
import statistics
from collections import deque
from collections.abc import Callable

import torch
from measure import interleaved, machine, of_bench, ratio
from torch import Tensor, nn

from nsvq import ResidualVectorQuantizer, VectorQuantizer
from nsvq.common import launch
from nsvq.tokenizer.health import usage

TOKENS = 65_536  # that a use is counted in
AT_ONCE = 10  # steps of one way, before another takes its turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--codebook_size", type=int, default=1024, help="K")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(f"{machine(device)}; K = {options.codebook_size}, {options.steps} steps\n")
    print("| task | layer | use | lowest | perplexity / K | error | ms a step | times ours |")
    print("|---|---|---|---|---|---|---|---|")
    for task in options.tasks:
        compare(task, options.codebook_size, options.steps, device)


def compare(task: str, size: int, steps: int, device: torch.device) -> None:
    dim, levels = (16, 4) if task == "residual" else (32, 1)
    runs = {}
    for name, layer in layers(dim, size, levels).items():
        torch.manual_seed(0)
        runs[name] = TASKS[task](layer.to(device), dim, steps)
    seconds = interleaved({name: run.train for name, run in runs.items()}, steps // AT_ONCE - 1, device)
    for name, run in runs.items():
        use, perplexity, error = run.measure()
        ms = 1e3 * statistics.median(seconds[name]) / AT_ONCE
        times = ratio(seconds[name], seconds["nsvq (ours)"])
        row = f"{use:.1%} | {run.lowest:.1%} | {perplexity:.2f} | {error:.4f} | {ms:.1f} | {times:.2f}"
        print(f"| {task} | {name} | {row} |", flush=True)


def layers(dim: int, size: int, levels: int) -> dict[str, nn.Module]:
    """Ours and theirs, each with its defaults, and theirs with what its README says against dead codes."""
    peers = of_bench("vector_quantize_pytorch")
    remedies = {"kmeans_init": True, "threshold_ema_dead_code": 2}
    if levels == 1:
        return {
            "nsvq (ours)": VectorQuantizer(dim, size),
            "vector-quantize-pytorch": peers.VectorQuantize(dim=dim, codebook_size=size),
            "the same, k-means start, dead codes replaced": peers.VectorQuantize(
                dim=dim, codebook_size=size, **remedies
            ),
        }
    theirs = {"dim": dim, "codebook_size": size, "num_quantizers": levels}
    return {
        "nsvq (ours)": ResidualVectorQuantizer(dim, size, levels),
        "vector-quantize-pytorch": peers.ResidualVQ(**theirs),
        "the same, k-means start, dead codes replaced": peers.ResidualVQ(**theirs, **remedies),
    }


class Run:
    """An autoencoder around a layer, and the data it trains on: `batch(count, generator, progress)`."""

    def __init__(
        self, layer: nn.Module, encoder: nn.Module, decoder: nn.Module, batch: Callable, count: int, steps: int
    ):
        self.layer, self.encoder, self.decoder, self.batch = layer, encoder, decoder, batch
        self.count, self.steps, self.step, self.lowest = count, steps, 0, 1.0
        self.device = next(iter([*layer.parameters(), *layer.buffers()])).device
        self.modules = nn.ModuleList([encoder, layer, decoder]).to(self.device)
        parameters = list(self.modules.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3) if parameters else None
        self.draws = torch.Generator().manual_seed(1)
        self.recent: deque[Tensor] = deque()

    def train(self) -> None:
        """The next steps."""
        for _ in range(AT_ONCE):
            x = self.batch(self.count, self.draws, self.step / self.steps).to(self.device)
            quantized, indices, loss = self.layer(self.encoder(x))
            loss = (self.decoder(quantized) - x).abs().mean() + loss.sum()
            if self.optimizer:
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
            self.step += 1
            self._watch(indices.detach())

    def _watch(self, indices: Tensor) -> None:
        size = _size(self.layer)
        indices = _by_level(self.layer, indices)
        self.recent.append(indices)
        while sum(map(len, self.recent)) - len(self.recent[0]) >= 32 * size:
            self.recent.popleft()
        if self.step % AT_ONCE == 0 and self.step > self.steps // 5 and sum(map(len, self.recent)) >= 32 * size:
            self.lowest = min(self.lowest, _use(torch.cat(list(self.recent)), size)[0])

    @torch.no_grad()
    def measure(self) -> tuple[float, float, float]:
        """Share of codes in use, perplexity / K, and error over variance, of the data as they are at the end."""
        self.modules.eval()
        draws, found, errors, squares = torch.Generator().manual_seed(2), [], [], []
        while sum(map(len, found)) < TOKENS:
            x = self.batch(self.count, draws, 1.0).to(self.device)
            quantized, indices, _ = self.layer(self.encoder(x))
            found.append(_by_level(self.layer, indices))
            errors.append((self.decoder(quantized) - x).square().mean())
            squares.append((x - x.mean(0)).square().mean())
        error = float(torch.stack(errors).mean() / torch.stack(squares).mean())
        return *_use(torch.cat(found), _size(self.layer)), error


def _by_level(layer: nn.Module, indices: Tensor) -> Tensor:
    """[..., levels], or [...] of a layer of one level, -> [N, levels]."""
    residual = isinstance(layer, (ResidualVectorQuantizer, of_bench("vector_quantize_pytorch").ResidualVQ))
    return indices.reshape(-1, indices.shape[-1] if residual else 1)


def _size(layer: nn.Module) -> int:
    return layer.levels[0].codebook_size if isinstance(layer, ResidualVectorQuantizer) else layer.codebook_size


def _use(indices: Tensor, size: int) -> tuple[float, float]:
    """Of indices [N, n]: share of codes that are there, perplexity / K, each the mean of the n codebooks."""
    found = [usage(torch.bincount(of_level, minlength=size)) for of_level in indices.T]
    shares = [each["utilization"] for each in found], [each["perplexity"] / size for each in found]
    return statistics.mean(shares[0]), statistics.mean(shares[1])


class _Images(nn.Module):
    """[B, 7, 7, d] tokens to and from feature maps, which is the form that both libraries take by default."""

    def __init__(self, network: nn.Module, before: bool):
        super().__init__()
        self.network, self.before = network, before

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            return self.network(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, 49, d)
        return self.network(x.transpose(1, 2).unflatten(2, (7, 7)))


def images(layer: nn.Module, dim: int, steps: int) -> Run:
    """The peer's example: a small convolutional autoencoder of gray images [B, 1, 28, 28], here of random blobs."""
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.MaxPool2d(2), nn.GELU(), nn.Conv2d(16, dim, 3, padding=1), nn.MaxPool2d(2)
    )
    decoder = nn.Sequential(
        nn.Upsample(scale_factor=2),
        nn.Conv2d(dim, 16, 3, padding=1),
        nn.GELU(),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(16, 1, 3, padding=1),
    )

    def batch(count: int, draws: torch.Generator, progress: float) -> Tensor:
        x, y, width, height, weight = torch.rand(5, count, 6, 1, 1, generator=draws)
        grid = torch.linspace(0, 1, 28)
        across, down = (grid - x).abs() - 0.05 - 0.2 * width, (grid[:, None] - y).abs() - 0.05 - 0.2 * height
        return (weight * torch.sigmoid(-60 * torch.maximum(across, down))).amax(1, keepdim=True)

    return Run(layer, _Images(encoder, True), _Images(decoder, False), batch, 64, steps)


def residual(layer: nn.Module, dim: int, steps: int) -> Run:
    """An RQ-VAE, as recommenders use it: vectors [B, 64] of clustered items, a small network on either side."""
    centers = torch.randn(100, 64, generator=torch.Generator().manual_seed(3))
    mix = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))

    def batch(count: int, draws: torch.Generator, progress: float) -> Tensor:
        of = torch.randint(100, (count,), generator=draws)
        return centers[of] + 0.5 * torch.randn(count, 8, generator=draws) @ mix

    def network(into: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Linear(into, 128), nn.GELU(), nn.Linear(128, out))

    return Run(layer, network(64, dim), network(dim, 64), batch, 1024, steps)


def drift(layer: nn.Module, dim: int, steps: int) -> Run:
    """No encoder: a Gaussian stream [B, d] that widens and walks ten of its deviations away."""
    way = nn.functional.normalize(torch.randn(dim, generator=torch.Generator().manual_seed(5)), dim=0)
    scale = torch.linspace(1, 0.1, dim)

    def batch(count: int, draws: torch.Generator, progress: float) -> Tensor:
        noise = torch.randn(count, dim, generator=draws) * scale
        return (1 + progress) * noise + 10 * progress * way

    return Run(layer, nn.Identity(), nn.Identity(), batch, 2048, steps)


TASKS = {"images": images, "residual": residual, "drift": drift}

if __name__ == "__main__":
    launch.run(main)
