"""Saved pipelines: `ClassConditionalPipeline` samples from the folder that a diffusion run leaves."""

from nsvq.pipelines.pipeline import ClassConditionalPipeline

__all__ = ["ClassConditionalPipeline"]
