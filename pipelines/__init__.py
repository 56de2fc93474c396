"""Saved pipelines: `ClassConditionalPipeline` samples from the folder that a diffusion run leaves."""

from pipelines.pipeline import ClassConditionalPipeline

__all__ = ["ClassConditionalPipeline"]
