"""Is the codebook alive, and does the encoder hold still? Usage, near-duplicates, drift and churn."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from nsvq.common.metrics import RankSums
from nsvq.tokenizer.codebook import nearest_neighbor_distance, nonstationary_loss, wins
from nsvq.tokenizer.quantizers import Quantizer


def usage(counts: Tensor) -> dict[str, float]:
    """Utilization (share of codes hit at least once), perplexity exp(H) and dead codes, of counts [K]."""
    p = counts.double() / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(p, p).sum()
    hit = int((counts > 0).sum())
    return {"utilization": hit / len(counts), "perplexity": float(entropy.exp()), "dead_codes": len(counts) - hit}


@torch.no_grad()
def near_duplicates(codebook: Tensor) -> int:
    """Codes of [K, d] closer to another code than a tenth of the median nearest-code distance."""
    distance = nearest_neighbor_distance(codebook)
    return int((distance < 0.1 * distance.median()).sum())


def alarms(values: dict[str, float], codebook_size: int) -> list[str]:
    """What a line of metrics says about a codebook that collapses or a GAN that diverges (see docs/watching.md)."""
    found = []
    if (used := values.get("utilization", 1.0)) < 0.25:
        what = f"{used:.1%} of {codebook_size} codes were used in the epoch, perplexity {values['perplexity']:.1f}"
        found.append(f"the codebook collapses: {what}")
    if "discriminator" in values:
        loss, real, fake = (values[name] for name in ("discriminator", "real_logits", "fake_logits"))
        if loss < 0.05 or max(abs(real), abs(fake)) > 20:
            logits = f"mean logits {real:.2f} on real and {fake:.2f} on reconstructed images"
            found.append(f"the GAN diverges: discriminator loss {loss:.3f} (1 is a draw), {logits}")
    return found


class EpochUsage(RankSums):
    """Counts and summed squared error of each code, and the mean raw commitment loss, over an epoch and all ranks."""

    def __init__(self, codebook_size: int, accelerator: Accelerator):
        super().__init__(accelerator)
        self.codebook_size = codebook_size
        self.reset()

    def update(self, indices: Tensor | None, errors: Tensor | None, commitment: Tensor, images: int) -> None:
        """indices [B, h, w] of one micro-batch (None where there are no codes yet), the squared errors [B, h, w] of its
        tokens (None where nobody asks for them), its mean commitment loss, and B."""
        if indices is not None:
            indices = indices.flatten()
            self.add_to("counts", wins(indices, self.codebook_size))
            if errors is not None:
                errors = errors.flatten().double()
                self.add_to("errors", errors.new_zeros(self.codebook_size).scatter_add_(0, indices, errors))
        total = commitment.detach().double() * images
        self.add_to("commitment", torch.stack([total, total.new_full((), images)]))

    def total(self) -> tuple[Tensor, Tensor, float]:
        """(counts [K], squared errors [K], mean commitment) over all ranks so far."""
        sums = {name: self.accelerator.reduce(value, "sum") for name, value in self.sums.items()}
        total, images = sums["commitment"].tolist()
        return sums["counts"], sums["errors"], total / max(images, 1)

    def reset(self) -> None:
        counts = torch.zeros(self.codebook_size, dtype=torch.int64, device=self.accelerator.device)
        self.sums = {"counts": counts, "errors": counts.double(), "commitment": counts.new_zeros(2).double()}


class DriftProbe:
    """Encoder drift and assignment churn on fixed images between two calls of `measure` (NSVQ, eq. 7 and 19)."""

    def __init__(self, images: Tensor):
        self.images = images  # [B, 3, H, W]
        self.latents: Tensor | None = None  # of the last call, [N, d]
        self.indices: Tensor | None = None  # [N]

    @torch.no_grad()
    def measure(self, encoder: nn.Module, quantizer: Quantizer, temperature: float) -> dict[str, float]:
        """drift_rms, drift_relative (divided by the RMS of z); where there are codes churn, and where they learn how
        wide the NS softmax is just now."""
        z = encoder(self.images).float().permute(0, 2, 3, 1).flatten(0, 2)  # (N, d)
        rms = z.square().mean().sqrt().item()
        values = {"latent_rms": rms}
        with torch.autocast(z.device.type, enabled=False):
            indices = quantizer.lookup(z) if quantizer.has_codes else None
            if quantizer.learns_codes:
                found = quantizer.prepare(z), quantizer.codebook(), indices
                ns = nonstationary_loss(*found, temperature, quantizer.own_temperature)
                values |= {"winner_mass": ns.winner_mass.item(), "effective_codes": ns.effective_codes.item()}
        if self.latents is not None:
            drift = (z - self.latents).square().mean().sqrt().item()
            values["drift_rms"], values["drift_relative"] = drift, drift / max(rms, 1e-12)
            if self.indices is not None:
                values["churn"] = (indices != self.indices).float().mean().item()
        self.latents, self.indices = z, indices
        return values

    def state_dict(self) -> dict:
        return {"latents": self.latents, "indices": self.indices}

    def load_state_dict(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value if value is None else value.to(self.images.device))
