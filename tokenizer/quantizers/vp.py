"""VP-VAE (arXiv 2602.17133): no codebook in training. Latents take one Metropolis-Hastings step of about the size of
the quantization error that K codes would make, which keeps their distribution; k-means finds the codes at the end.

With D_m(x) the distance from x to its m-th neighbour among Q = K M saved latents (M neighbours hold 1/K of the mass):
radius R(z) = eta D_M(z), density ~ D_k(z)^-d, proposal z' uniform in the d-ball of R(z) around z;
log alpha = d [ln D_k(z) + ln D_M(z) - ln D_k(z') - ln D_M(z')]; accepted where ln U < log alpha and |z' - z| <= R(z')
(eq. 3-8). A rejected token passes as it is. The regulariser holds each channel at mean 0 and variance 1 (eq. 10-11).

Before `fit`, evaluation perturbs as training does: its PSNR stands for that of K codes, and there are no indices."""

from typing import Literal

import torch
from pydantic import Field
from scipy.spatial import cKDTree
from torch import Tensor

from nsvq.tokenizer import ranks
from nsvq.tokenizer.kmeans import kmeans
from nsvq.tokenizer.quantizers.base import CodebookConfig, Quantizer, straight_through


class VPConfig(CodebookConfig):
    name: Literal["vp"] = Field(description="vp: perturbation in training, k-means codes after it.")
    neighbors: int = Field(8, ge=1, description="k of the density estimate.")
    rate: float = Field(16, gt=0, description="M / d, the saved latents per code and channel: Q = K round(rate d).")
    noise: float = Field(1.1, gt=0, description="eta, the radius in units of D_M; 1.05-1.12 matches k-means codes.")
    push: float = Field(0.01, gt=0, le=1, description="Share of tokens that are saved.")
    refresh: int = Field(100, ge=1, description="Micro-batches between two rebuilds of the search tree.")
    mean_weight: float = Field(0.1, ge=0, description="Weight of the squared mean of the latents.")
    variance_weight: float = Field(0.07, ge=0, description="Weight of the squared error of their variance.")

    def check_dim(self, dim: int) -> None:
        if dim > 16:
            limit = "at most 16 channels (3 to 5 in its paper)"
            raise ValueError(f"vp estimates densities by neighbours, for {limit}; model.latent_channels = {dim}")


class VP(Quantizer):
    """State: the FIFO `queue` [Q, d], what the search tree was built of (`searched` [Q, d]), the codes once fitted."""

    Config = VPConfig

    def __init__(self, config: VPConfig, dim: int):
        super().__init__(config, dim)
        self.mass = max(config.neighbors, round(config.rate * dim))  # M
        self.register_buffer("queue", torch.randn(config.codebook_size * self.mass, dim))
        self.register_buffer("searched", self.queue.clone())
        self.register_buffer("position", torch.tensor(0))
        self.register_buffer("age", torch.tensor(0))  # micro-batches since the tree was built
        self.register_buffer("weight", torch.zeros(config.codebook_size, dim))
        self.register_buffer("fitted", torch.tensor(False))
        self.draws = ranks.Draws()
        self._tree: cKDTree | None = None
        self._pending: list[Tensor] = []

    @property
    def has_codes(self) -> bool:
        return bool(self.fitted)

    def loss_weights(self) -> dict[str, float]:
        return {"latent_mean": self.config.mean_weight, "latent_variance": self.config.variance_weight}

    def quantize(self, z: Tensor, temperature: float | None) -> tuple[Tensor, Tensor | None, dict, dict]:
        losses, stats, indices = moment_losses(z, 1.0) if self.training else {}, {}, None
        if self.fitted:
            indices = self.lookup(z)
            value = self.weight[indices]
        else:
            value, stats = self._perturb(z.detach())
        losses["commitment"] = (z - value).square().mean()
        return straight_through(z, value), indices, losses, stats

    @torch.no_grad()
    def _perturb(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        generator, d = self.draws.generator(), self.dim
        density, radius = self._distances(z)
        direction = self.draws.normal(generator, z, d)
        length = self.config.noise * radius * self.draws.uniform(generator, z).pow(1 / d)
        offset = length[:, None] * direction / direction.norm(dim=1, keepdim=True)
        there_density, there_radius = self._distances(z + offset)
        log_alpha = d * (density.log() + radius.log() - there_density.log() - there_radius.log())
        accepted = self.draws.uniform(generator, z).log() < log_alpha
        accepted &= length <= self.config.noise * there_radius
        if self.training:
            pushed = torch.rand(len(z) * ranks.world()[1], generator=generator) < self.config.push
            self._pending.append(ranks.rows(z, torch.nonzero(pushed).flatten().to(z.device)))
        stats = {"acceptance": accepted.float().mean(), "radius": self.config.noise * radius.mean()}
        return z + accepted[:, None] * offset, stats

    def _distances(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(D_k, D_M) of points [N, d], each [N]; at least 1e-12, for latents that are equal."""
        if self._tree is None:
            self._tree = cKDTree(self.searched.cpu().numpy())
        points = x.nan_to_num(0.0, 0.0, 0.0).cpu().numpy()  # a loss that is not finite is the trainer's to see
        found, _ = self._tree.query(points, k=[self.config.neighbors, self.mass], workers=-1)
        return torch.from_numpy(found).to(x).clamp(min=1e-12).unbind(1)

    @torch.no_grad()
    def end_step(self, stepped: bool) -> None:
        """Save what was drawn; build the tree again when it is old."""
        for tokens in self._pending if stepped else []:
            tokens = tokens[-len(self.queue) :]
            places = (self.position + torch.arange(len(tokens), device=tokens.device)) % len(self.queue)
            self.queue[places] = tokens
            self.position.copy_((self.position + len(tokens)) % len(self.queue))
            self.age += 1
        self._pending.clear()
        if self.age >= self.config.refresh:
            self.age.zero_()
            self.searched.copy_(self.queue)
            self._tree = None

    def _load_from_state_dict(self, *arguments) -> None:
        super()._load_from_state_dict(*arguments)
        self._tree = None

    def final_latents(self) -> int:
        return self.codebook_size * round(16 * self.dim)

    @torch.no_grad()
    def fit(self, latents: Tensor) -> None:
        """k-means of the latents of all ranks; they stay the codes."""
        self.weight.copy_(kmeans(lambda: [latents], self.codebook_size, seed=0))
        self.fitted.fill_(True)

    def codebook(self) -> Tensor:
        if not self.fitted:
            raise RuntimeError("vp has no codes before `fit`")
        return self.weight


def moment_losses(z: Tensor, variance: float) -> dict[str, Tensor]:
    """Means over channels of the squared mean of z [N, d], and of the squared error of its (unbiased) variance; both
    moments over the tokens of all ranks."""
    center = ranks.mean(z.detach().mean(0))
    shifted = z - center
    offset, square = ranks.mean(shifted.mean(0)), ranks.mean(shifted.square().mean(0))
    count = len(z) * ranks.world()[1]
    found = (square - offset.square()) * count / (count - 1)
    return {"latent_mean": (center + offset).square().mean(), "latent_variance": (found - variance).square().mean()}
