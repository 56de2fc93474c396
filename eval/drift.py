"""How far an encoder moved between two checkpoints of a tokenizer, and how many codes changed with it."""

from torch import Tensor

from nsvq.errors import UsageError
from nsvq.eval.autoencoders import encode
from nsvq.eval.distributed import in_groups
from nsvq.tokenizer.pretrained import Tokenizer

MEANINGS = {
    "drift_rms": "root mean square of how far the encoder's outputs moved since the compared tokenizer (NSVQ, eq. 7)",
    "drift_relative": "the same / root mean square of the encoder's output now",
    "churn": "share of tokens whose code is another than in the compared tokenizer (NSVQ, eq. 19)",
}


class Drift:
    """From the tokenizer `before` to `now`, image by image. Raises `UsageError` where one has no codebook, or their
    latents are not of one shape."""

    def __init__(self, now: Tokenizer, before: Tokenizer, now_folder: str, before_folder: str):
        self.now, self.before = now, before
        if 0 in (now.codebook_size, before.codebook_size):
            raise UsageError(f"--compare: {now_folder} and {before_folder} must both have a codebook")
        shapes = [(t.downsampling, t.codebook.shape[1]) for t in (now, before)]
        if shapes[0] != shapes[1]:
            theirs = f"its latents (downsampling, width) = {shapes[1]}"
            raise UsageError(f"--compare {before_folder}: {theirs} are not those of {now_folder}, {shapes[0]}")

    def measure(self, images: Tensor, now: dict[str, Tensor]) -> dict[str, Tensor]:
        """images [B, 3, H, W] in [-1, 1], and what `encode` gives of them now -> [B] float64 each: "drift", the mean
        squared move, "square", the mean square, and "churn", the share of other codes."""
        before = in_groups(lambda group: encode(self.before, group), images)
        z, z_before = _uncentred(self.now, now["z"]), _uncentred(self.before, before["z"])
        return {
            "drift": (z - z_before).double().square().flatten(1).mean(1),
            "square": z.double().square().flatten(1).mean(1),
            "churn": (now["indices"] != before["indices"]).double().flatten(1).mean(1),
        }

    @staticmethod
    def metrics(rows: dict[str, Tensor]) -> dict[str, float]:
        """The numbers of all images' rows [N]."""
        drift, square = rows["drift"].mean().sqrt(), rows["square"].mean().sqrt()
        numbers = {"drift_rms": drift, "drift_relative": drift / square, "churn": rows["churn"].mean()}
        return {name: number.item() for name, number in numbers.items()}


def _uncentred(tokenizer: Tokenizer, z: Tensor) -> Tensor:
    """The encoder's own output: exported folders hold latents around their mean, which lies in `quant_conv`'s bias."""
    return z - tokenizer.model.quant_conv.bias[:, None, None]
