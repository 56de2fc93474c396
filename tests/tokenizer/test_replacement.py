import torch

from nsvq.tokenizer.replacement import replace_dead_codes


def setup(k=1000, d=4):
    table = torch.nn.Parameter(torch.randn(k, d))
    optimizer = torch.optim.Adam([table], lr=0.1)
    table.grad = torch.randn(k, d)
    optimizer.step()
    counts = torch.zeros(k, dtype=torch.int64)
    counts[10], counts[20], counts[30] = 1, 2, 7
    return table, optimizer, counts


def test_dead_codes_move_onto_active_ones_by_usage_and_active_ones_stay():
    table, optimizer, counts = setup()
    before = table.detach().clone()
    replaced = replace_dead_codes(table, counts, optimizer=optimizer, noise=0.001, seed=1)
    assert torch.equal(replaced, torch.nonzero(counts == 0).flatten())
    active = torch.tensor([10, 20, 30])
    assert torch.equal(table[active], before[active])
    dead = torch.nonzero(counts == 0).flatten()
    distance = torch.cdist(table[dead].detach(), before[active])
    source = distance.argmin(1)
    offsets = table[dead].detach() - before[active][source]
    assert 0.0009 < float(offsets.std()) < 0.0011
    shares = torch.bincount(source, minlength=3) / len(dead)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), atol=0.05, rtol=0)


def test_moments_are_cleared_for_replaced_rows_only_and_the_average_follows():
    table, optimizer, counts = setup()
    average = torch.zeros_like(table)
    moments = {name: value.clone() for name, value in optimizer.state[table].items() if name != "step"}
    replace_dead_codes(table, counts, optimizer=optimizer, averages=[average], noise=0.001, seed=1)
    dead, active = counts == 0, counts > 0
    for name, before in moments.items():
        after = optimizer.state[table][name]
        assert torch.equal(after[active], before[active])
        assert not after[dead].any()
    assert torch.equal(average[dead], table[dead])
    assert not average[active].any()


def test_equal_seeds_give_equal_tables_and_others_do_not():
    tables = []
    for seed in (3, 3, 4):
        torch.manual_seed(0)
        table, optimizer, counts = setup()
        replace_dead_codes(table, counts, optimizer=optimizer, noise=0.001, seed=seed)
        tables.append(table.detach())
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def test_nothing_moves_when_every_code_is_used_or_none_is():
    table, optimizer, counts = setup()
    before = table.detach().clone()
    for value in (torch.ones_like(counts), torch.zeros_like(counts)):
        assert len(replace_dead_codes(table, value, optimizer=optimizer, noise=0.001, seed=0)) == 0
    assert torch.equal(table, before)


def test_codes_go_where_the_error_is_when_it_is_given():
    table, optimizer, counts = setup()
    before = table.detach().clone()
    errors = torch.zeros(len(counts), dtype=torch.float64)
    errors[10], errors[30] = 3.0, 1.0
    errors[5] = 100.0  # an unused code's error means nothing
    dead = replace_dead_codes(table, counts, weights=errors, optimizer=optimizer, noise=0.001, seed=1)
    source = torch.cdist(table[dead].detach(), before[[10, 20, 30]]).argmin(1)
    shares = torch.bincount(source, minlength=3) / len(dead)
    torch.testing.assert_close(shares, torch.tensor([0.75, 0.0, 0.25]), atol=0.05, rtol=0)
