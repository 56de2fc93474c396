import pytest
import torch

from nsvq.tokenizer.kmeans import kmeans


def test_separated_clusters_are_found_in_any_batching():
    centers = 20 * torch.randn(6, 5)
    points = (centers[:, None] + 0.1 * torch.randn(6, 100, 5)).flatten(0, 1)
    points = points[torch.randperm(600)]
    whole = kmeans(lambda: [points], 6, seed=0)
    parts = kmeans(lambda: points.split(70), 6, seed=0, start=whole, iterations=1)
    nearest = torch.cdist(centers, whole)
    assert float(nearest.amin(1).max()) < 0.2
    assert len(nearest.argmin(1).unique()) == 6
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


def test_the_end_is_a_fixed_point_of_lloyds_iteration():
    points = torch.randn(2000, 2)
    centroids = kmeans(lambda: [points], 10, seed=1, tolerance=1e-6)
    nearest = torch.cdist(points.double(), centroids.double()).argmin(1)
    means = torch.stack([points[nearest == i].double().mean(0) for i in range(10)])
    torch.testing.assert_close(centroids.double(), means, atol=1e-4, rtol=1e-4)


def test_a_centroid_without_points_takes_part_of_a_full_cluster():
    points = torch.randn(500, 3)
    start = torch.cat([points[:4], torch.full((3, 3), 1e3)])
    centroids = kmeans(lambda: [points], 7, seed=0, start=start)
    assert len(torch.cdist(points, centroids).argmin(1).unique()) == 7


def test_the_end_does_not_depend_on_the_scale():
    points = torch.randn(2000, 2)
    expected = kmeans(lambda: [points], 10, seed=1)
    for scale in (2**-14, 2**14):
        assert torch.equal(kmeans(lambda s=scale: [points * s], 10, seed=1), expected * scale)


def test_an_empty_centroid_of_single_numbers_moves():
    points = torch.tensor([[0.0], [0.0], [0.0], [5.0], [5.1]])
    found = kmeans(lambda: [points], 3, seed=0, start=torch.tensor([[0.0], [5.0], [99.0]]))
    assert found.isfinite().all()
    assert len(found.unique()) == 3


@pytest.mark.slow
def test_ranks_with_different_numbers_of_points_are_one_or_are_refused_together(as_two_ranks):
    points = torch.randn(60, 4)

    def run(rank):
        mine = points[:50] if rank == 0 else points[50:]
        few = points[:3] if rank == 0 else points[3:]
        with pytest.raises(ValueError, match="at least as many") as refused:
            kmeans(lambda: [mine[:5]], 12, seed=0)
        return [kmeans(lambda: [mine], 10, seed=0), kmeans(lambda: [few], 10, seed=0), str(refused.value)]

    first, second = as_two_ranks(run)
    for one, other in zip(first, second, strict=True):
        assert one == other if isinstance(one, str) else torch.equal(one, other)
    assert "10 < 12" in first[2]
    torch.testing.assert_close(first[1], kmeans(lambda: [points], 10, seed=0))


def test_fewer_points_than_centroids_are_refused():
    with pytest.raises(ValueError, match="3 < 4"):
        kmeans(lambda: [torch.randn(3, 2)], 4, seed=0)
