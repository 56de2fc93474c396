def test_it_starts_uniform_in_one_over_k(make):
    weight = make("vq", codebook_size=200, dim=32, init="uniform").weight
    assert float(weight.abs().max()) <= 1 / 200
    assert abs(float(weight.std() * 200) - 3**-0.5) < 0.03
