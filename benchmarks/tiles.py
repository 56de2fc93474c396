"""The Triton kernels at other tiles than the ones in use, and the plain passes beside them.

python benchmarks/tiles.py                                  # at the paper's size, on a GPU; `make gpu` runs it
TRITON_INTERPRET=1 python benchmarks/tiles.py --latents 64 --codes 200 --dim 16 --rounds 1       # whether it runs
Ways are interleaved; a time is the median of the rounds, a ratio the median of ratios to the tile in use. Where another
one is clearly faster on a card, it belongs into `SEARCH` or `sums_tile` of tokenizer/codebook_triton.py.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
import triton
from measure import interleaved, machine, ratio

from nsvq.tokenizer import codebook_tiles
from nsvq.tokenizer.codebook_triton import SEARCH, Tile, nearest_code, softmax_sums, sums_tile

# At d = 128 and compute capability 9.0 all keep within the registers, but for the sums' 64 x 64.
SEARCHES = [Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(128, 128, 8, 2)]
SUMS = [Tile(64, 64, 8, 2), Tile(32, 64, 8, 2), Tile(16, 32, 4, 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=32_768, help="N")
    parser.add_argument("--codes", type=int, default=65_536, help="K")
    parser.add_argument("--dim", type=int, default=128, help="d")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("error: torch finds no GPU, and TRITON_INTERPRET=1 is not set: there is nothing to time")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    z, codes = (torch.randn(rows, options.dim, device=device) for rows in (options.latents, options.codes))
    temperature = 0.01 * options.dim
    print(f"{machine(device)}; N = {len(z):,}, K = {len(codes):,}, d = {options.dim}, {options.rounds} rounds\n")

    passes: dict[str, tuple] = {
        "search": (
            [SEARCH, *SEARCHES],
            lambda tile: nearest_code(z, codes, False, tile),
            lambda: codebook_tiles.nearest_code(z, codes, False),
        ),
        "NS loss, with the search": (
            [sums_tile(options.dim, device), *SUMS],
            lambda tile: softmax_sums(z, codes, None, temperature, False, tile),
            lambda: codebook_tiles.softmax_sums(z, codes, None, temperature, False),
        ),
    }
    print("| pass | latents x codes, warps, stages | ms | times the tile in use |\n|---|---|---|---|")
    for name, (tiles, run, plain) in passes.items():
        ways: dict[str, Callable] = {}
        for tile in dict.fromkeys(tiles):
            words = f"{tile.latents} x {tile.codes}, {tile.warps}, {tile.stages}"
            try:
                run(tile)
                ways[words] = partial(run, tile)
            except triton.runtime.errors.OutOfResources as error:
                print(f"| {name} | {words} | {error} | |")
        in_use = next(iter(ways))
        seconds = interleaved(ways | {"plain PyTorch": plain}, options.rounds, device)
        for words, times in seconds.items():
            middle = 1e3 * statistics.median(times)
            print(f"| {name} | {words} | {middle:.1f} | {ratio(times, seconds[in_use]):.2f} |", flush=True)


if __name__ == "__main__":
    main()
