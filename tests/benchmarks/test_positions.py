import importlib
import json
import sys
from pathlib import Path

import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nsvq.autoregressive.model import ModelConfig, NextToken, make_llama

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
positions = importlib.import_module("positions")
sys.path.remove(str(ROOT / "benchmarks"))


def test_2d_rotary_logits_are_those_of_the_differences_of_rows_and_columns():
    size, rows, columns, theta = 16, 3, 5, 100.0
    places = torch.arange(1 + rows * columns)
    queries, keys = torch.randn(2, len(places), size, dtype=torch.float64)
    cos, sin = positions.Rotary2D(size, columns, theta)(queries, places[None])
    turned = apply_rotary_pos_emb(queries[None, None], keys[None, None], cos, sin)
    logits = turned[0][0, 0] @ turned[1][0, 0].T

    # Dimensions i and i + size / 2 are one complex number: its product with another turns by the difference of places.
    grid = [(-1, columns - 1)] + [(row, column) for row in range(rows) for column in range(columns)]
    grid = torch.tensor(grid, dtype=torch.float64)
    difference = grid[:, None] - grid[None]  # [query, key, 2]
    frequencies = theta ** -(torch.arange(0, size // 2, 2, dtype=torch.float64) / (size // 2))
    angles = torch.cat([difference[..., :1] * frequencies, difference[..., 1:] * frequencies], dim=-1)
    q, k = (torch.complex(x[:, : size // 2], x[:, size // 2 :]) for x in (queries, keys))
    expected = (q[:, None] * k.conj()[None] * torch.polar(torch.ones_like(angles), angles)).real.sum(-1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # the angles are float32, as Llama's


def test_every_kind_of_positions_tells_the_order_of_codes_and_sees_none_that_follow(monkeypatch):
    llama = make_llama(ModelConfig(size="tiny", depth=1, width=16, heads=2), 16, 3, 6)
    torch.nn.init.normal_(llama.lm_head.weight)
    monkeypatch.setattr(positions.AutoregressiveTrainer, "make_network", lambda self: llama)
    stock = llama.model.rotary_emb, llama.model.embed_tokens
    trainer = object.__new__(positions.PositionsTrainer)
    trainer.cache = type("Cache", (), {"shape": (2, 3)})
    codes = torch.tensor([[1, 2, 3, 4, 5, 6]])
    seen = {}
    for way in ("rotary", "rotary-2d", "rotary+table", "table"):
        llama.model.rotary_emb, llama.model.embed_tokens = stock
        trainer.way = way
        hidden = trainer.make_network().model
        sequence = torch.cat([torch.tensor([[17]]), codes], dim=1)
        swapped = sequence[:, [0, 2, 1, 3, 4, 5, 6]]
        out, other = (hidden(x, use_cache=False).last_hidden_state for x in (sequence, swapped))
        torch.testing.assert_close(out[:, 0], other[:, 0])
        assert not torch.allclose(out[:, 3:], other[:, 3:], rtol=0, atol=1e-5)
        seen[way] = NextToken(llama, 16)(torch.tensor([17]), codes).item()
    assert len(set(seen.values())) == 4


def test_runs_go_on_where_steps_ended_them_and_the_table_has_each_way(
    run_script, tmp_path, capsys, tokenizer_folder, image_folder
):
    config = tmp_path / "config.yaml"
    config.write_text(
        "schedule: {steps: 4}\nmodel: {size: tiny, depth: 1, width: 16, heads: 2}\nheld_out: {every: 2}\n"
        "run: {batch_size: 8, workers: 0, log_every: 1, trackers: [], mixed_precision: 'no'}\n"
    )
    data = ("--data", image_folder, "--data.image_size", 16, "--data.holdout", 0.05)
    run = ("--config", config, "--tokenizer", tokenizer_folder, *data, "--out", tmp_path / "runs")
    run_script(positions.main, *run, "--steps", 2)
    run_script(positions.main, *run)
    head, _, *rows = capsys.readouterr().out.split("\n| positions")[-1].strip().splitlines()
    assert head == "| bits at 2 | bits at 4 | seconds |"
    assert [row.split(" | ")[0] for row in rows] == ["| rotary", "| rotary-2d", "| rotary+table", "| table"]
    for way in ("rotary", "table"):
        lines = [json.loads(x) for x in (tmp_path / "runs" / way / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
