"""The temperature of the NS loss (NSVQ, arXiv 2606.11363, eq. 8), which may follow the scale of the latents."""

from nsvq.tokenizer.nsvq_config import PullConfig


class Temperature:
    """tau of the NS loss: constant, or in units of the running mean of the squared distance to the nearest code, or (in
    the codebook's engine) of a latent's own. Where nothing is pulled, it is the paper's, for watching the softmax."""

    decay = 0.99

    def __init__(self, pull: PullConfig | None, dim: int):
        self.config, self.dim = pull or PullConfig(), dim
        self.follows = self.config.relative_to == "mean"  # `update`
        self.distance: float | None = None

    def value(self) -> float | None:
        """tau in squared distance summed over d, or in units of a latent's own; None before a distance is
        known, or while all are 0."""
        if not self.follows:
            return self.config.temperature
        return self.config.temperature * self.distance if self.distance else None

    def update(self, commitment: float) -> None:
        """Take in a step's mean commitment loss, over all ranks."""
        new = self.dim * commitment
        self.distance = new if self.distance is None else self.decay * self.distance + (1 - self.decay) * new

    def state_dict(self) -> dict:
        return {"distance": self.distance}

    def load_state_dict(self, state: dict) -> None:
        self.distance = state["distance"]
