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


def test_fewer_points_than_centroids_are_refused():
    with pytest.raises(ValueError, match="3 < 4"):
        kmeans(lambda: [torch.randn(3, 2)], 4, seed=0)
