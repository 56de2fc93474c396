"""The data section of a config, and the base of every section."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Config(BaseModel):
    """Base of every config section: an unknown key is an error, and fields carry their own description."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True, allow_inf_nan=False)
    renamed: ClassVar[dict[str, str]] = {}  # a key, or "key: value", that there was once: what it is now

    @model_validator(mode="before")
    @classmethod
    def _default_kinds(cls, values: Any) -> Any:
        """A section of several kinds that does not say which one it is, is the default one."""
        for name, field in cls.model_fields.items():
            if field.discriminator and isinstance(values, dict) and isinstance(values.get(name), dict):
                kind = getattr(field.get_default(call_default_factory=True), str(field.discriminator))
                values = values | {name: {str(field.discriminator): kind} | values[name]}
        return values


IMAGENET = "ILSVRC/imagenet-1k"


class DataConfig(Config):
    """The images. `--data SOURCE` is short for `--data.source SOURCE`."""

    source: str = Field(
        IMAGENET,
        min_length=1,
        description="Hugging Face data set id; folder of class folders, of parquet files or of webdataset tars; "
        "parquet or tar file, glob or {a..b} brace; or synthetic.",
    )
    subset: str | None = Field(None, description="Configuration of a Hub data set that has several.")
    train_split: str | None = Field(None, description="Split to train on; null: train.")
    test_split: str | None = Field(
        None,
        description="Split to measure on; null: the first of validation, val, test that there is, else a fixed random "
        "share of the training split, which training then leaves out.",
    )
    holdout: float = Field(0.02, gt=0, lt=1, description="That share, where there is no split to measure on.")
    image_column: str | None = Field(None, description="Column of images; null: the only one of type Image.")
    label_column: str | None = Field(
        None,
        description="Column of classes, or field or JSON key of a shard's samples; null: label, cls, class, target, "
        "category or the like, or the only ClassLabel.",
    )
    class_names: str | None = Field(None, description="Text file with one class name a line, in label order.")
    image_size: int = Field(128, ge=8, le=2048, description="Side of the square images, in pixels.")
    flip: bool = Field(True, description="Mirror half of the training images.")
    max_bad_fraction: float = Field(
        0.01, ge=0, le=1, description="Share of images that may fail to decode before the run ends."
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value
