import numpy as np
import pytest

from nsvq.data import synthetic


def render(split, i, size):
    return np.asarray(synthetic.render(split, i, size)).astype(float)


def test_a_sample_is_a_function_of_split_and_index_alone():
    first = [render("train", i, 32) for i in range(20)]
    again = [render("train", i, 32) for i in reversed(range(20))][::-1]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not any((a == render("test", i, 32)).all() for i, a in enumerate(first))


def test_the_set_is_unlimited_and_its_samples_differ():
    images = [render("train", i, 32).tobytes() for i in [*range(200), 10**6, 10**12]]
    assert len(set(images)) == len(images)


@pytest.mark.parametrize("i", range(10))
def test_any_size_shows_the_same_antialiased_picture(i):
    small, large = render("test", i, 48), render("test", i, 192)
    averaged = large.reshape(48, 4, 48, 4, 3).mean((1, 3))
    difference = np.abs(small - averaged)
    assert difference.mean() < 1.5
    assert np.quantile(difference, 0.99) < 20  # edges without antialiasing are off by more


def test_ten_named_classes_take_turns():
    assert len(synthetic.CLASSES) == len(set(synthetic.CLASSES)) == 10
    assert np.bincount([synthetic.label(i) for i in range(1000)]).tolist() == [100] * 10


def test_object_and_background_always_contrast():
    weights = [0.299, 0.587, 0.114]
    for i in range(0, 2000, 10):  # discs, which always cover the middle and never a corner
        luma = render("train", i, 32) @ weights
        middle = luma[14:18, 14:18].mean()
        corners = np.mean([luma[0, 0], luma[0, -1], luma[-1, 0], luma[-1, -1]])
        assert abs(middle - corners) > 25


@pytest.mark.slow
def test_colour_and_light_do_not_tell_the_class():
    # The best linear guess from the mean colour and the corner colours is no better than chance (10 %).
    features, labels = [], []
    for i in range(2000):
        image = render("train", i, 16) / 255
        features.append([1, *image[0, 0], *image[0, -1], *image[-1, 0], *image[-1, -1]])
        labels.append(synthetic.label(i))
    features, targets = np.array(features), np.eye(10)[labels]
    solution = np.linalg.lstsq(features[:1000], targets[:1000], rcond=None)[0]
    accuracy = ((features[1000:] @ solution).argmax(1) == labels[1000:]).mean()
    assert accuracy < 0.16
