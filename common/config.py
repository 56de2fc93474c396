"""Typed configs: pydantic models filled from defaults, a YAML file and `--any.key value` arguments, in that order.

A file may name a `base:`, another file, and then holds only what it changes in it.

class TrainConfig(Config):
    steps: int = Field(1000, gt=0, description="Optimizer steps.")

config = parse(TrainConfig, sys.argv[1:])"""

import difflib
import os
import re
import sys
import types
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import ValidationError

from nsvq.data.config import Config
from nsvq.errors import UsageError

C = TypeVar("C", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML with the words of YAML 1.2: `no` and `on` are words, not false and true, and 1e-4 is a number. A key that is
    there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?|\.inf|\.nan)$"),
    list("-+0123456789."),
)


def parse(schema: type[C], argv: list[str], default_file: Path | None = None) -> C:
    """Build a config from `--config FILE` (else `default_file`, if any) and `--any.key value` overrides. `--help`
    prints every key with its type, meaning and the value that it has without `--help`, and exits. Raises `UsageError`
    with the key, the value, what is allowed and the nearest valid key."""
    words = [word for word in argv if word not in ("-h", "--help")]
    overrides = _read_arguments(words)
    file = overrides.pop("config", default_file)
    values = read_config(file) if file is not None else {}
    for key, value in overrides.items():
        _set(values, schema, key, value)
    source = str(file) if file else "command line"
    if len(words) < len(argv):
        lacks = any(field.is_required() and name not in values for name, field in schema.model_fields.items())
        print(describe(schema, file, None if lacks else validate(schema, values, source)))
        sys.exit(0)
    return validate(schema, values, source)


def validate(schema: type[C], values: dict, source: str = "config") -> C:
    """`schema(**values)` with every problem told in one `UsageError` line."""
    try:
        return schema(**values)
    except ValidationError as error:
        raise UsageError(f"{source}: " + "; ".join(_explain(schema, e) for e in error.errors())) from None


def read_yaml(path: str | Path) -> dict:
    """A YAML mapping from `path`; raises `UsageError` where there is no such file or it is not a mapping."""
    try:
        values = yaml.load(Path(path).read_text("utf-8-sig"), _Loader)
    except OSError as error:
        raise UsageError(f"cannot read the config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"cannot read the config {path}: it is not in UTF-8 ({error.reason})") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values or {}, dict):
        raise UsageError(f"{path} must hold a mapping of keys to values")
    return values or {}


def read_config(path: str | Path) -> dict:
    """The keys of a config over those of the file that it names as its `base`, relative to itself, and so on down.
    Raises `UsageError` as `read_yaml` does, and where files are each other's base."""
    files, layers = [Path(path)], [read_yaml(path)]
    while (base := layers[-1].pop("base", None)) is not None:
        files.append(Path(os.path.normpath(files[-1].parent / str(base))))
        if files[-1] in files[:-1]:
            raise UsageError(f"configs are each other's base: {' -> '.join(map(str, files))}")
        if not files[-1].is_file():
            raise UsageError(f"{files[-2]}: its base {files[-1]} is no file")
        layers.append(read_yaml(files[-1]))
    return reduce(merged, reversed(layers))


def merged(base: dict, changes: dict) -> dict:
    """`base` with `changes`, section by section. What is no section, lists too, takes the place of what there was; so
    does a section that chooses another method, network or objective by its `name` or `variant`: their options differ.
    Raises `UsageError` where a section meets its short form, of which only the schema knows what it is short for."""
    result = base | changes
    for key, new in changes.items():
        old = base.get(key)
        if isinstance(old, str) and isinstance(new, dict):
            raise UsageError(f"{key}: its base gives it in the short form {old!r}; it must be a section there")
        if isinstance(old, dict) and isinstance(new, dict):
            other = any(k in new and new[k] != old.get(k, new[k]) for k in ("name", "variant"))
            result[key] = new if other else merged(old, new)
    return result


def to_dict(config: Config) -> dict:
    """The resolved config as plain Python values, ready for YAML or JSON."""
    return config.model_dump(mode="json")


def with_defaults(old: dict, config: Config) -> dict:
    """An older program's resolved config, of plain values, with the defaults of the keys that it did not have."""
    filled = dict(old)
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name in old and isinstance(value, Config) and isinstance(old[name], dict):
            filled[name] = with_defaults(old[name], value)
        elif name not in old and not field.is_required():
            default = config.model_copy(update={name: field.get_default(call_default_factory=True)})
            filled[name] = default.model_dump(mode="json", include={name}, warnings=False)[name]
    return filled


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """One line, "key: old -> new", for each leaf on which two resolved configs differ."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def describe(schema: type[Config], file: Path | None = None, config: Config | None = None) -> str:
    """The text of `--help`: the docstring of the schema, then one line a key, with its value in `config`, which is of
    `file`; without one, with the schema's default."""
    doc = " ".join((schema.__doc__ or "").split())
    start = f"--config FILE (default: {file}, whose values are in the defaults below), then " if file else ""
    keys = _describe(schema, "", config)
    return "\n".join([doc, "", "options: " + (start or "--config FILE, then ") + "any of these keys:", *keys])


def _describe(schema: type[Config], prefix: str, config: Config | None, said: str = "") -> list[str]:
    """Without the key `said`, which tells sections apart."""
    lines = []
    for name, field in schema.model_fields.items():
        if name == said:
            continue
        value = field.get_default(call_default_factory=True) if config is None else getattr(config, name)
        sections = _sections(field.annotation)
        if sections and field.description:
            or_null = " or null" if type(None) in get_args(field.annotation) else ""
            off = " (default: null)" if value is None else ""
            lines.append(f"  --{prefix}{name} a section{or_null}{off}\n        {field.description}")
        apart = str(field.discriminator) if len(sections) > 1 else ""
        if apart:
            choices = [get_args(section.model_fields[apart].annotation) for section in sections]
            every = ",".join(choice for some in choices for choice in some)
            lines.append(f"  --{prefix}{name}.{apart} {{{every}}} (default: {getattr(value, apart)})")
            lines += [f"        {section.model_fields[apart].description}" for section in sections]
        for section in sections:
            if apart:
                lines.append(f"  with {prefix}{name}.{apart} {' or '.join(choices.pop(0))}:")
            chosen = value if type(value) is section else None
            lines += _describe(section, f"{prefix}{name}.", chosen, apart)
        if not sections:
            required = field.is_required() and config is None
            default = "(required)" if required else f"(default: {'null' if value is None else value})"
            lines.append(f"  --{prefix}{name} {_type_name(field.annotation)} {default}")
            lines.append(f"        {field.description or ''}")
    return lines


def _leaves(schema: type[Config], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, field in schema.model_fields.items():
        sections = _sections(field.annotation)
        if field.description or not sections:
            leaves[prefix + name] = field
        for section in sections:
            leaves = _leaves(section, f"{prefix}{name}.") | leaves
    return leaves


def _sections(annotation: Any) -> list[type[Config]]:
    """The schemas that a section may have: one, several of a union told apart by a `discriminator`; none for a leaf."""
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else [annotation]
    return [member for member in members if isinstance(member, type) and issubclass(member, Config)]


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, get_args(annotation))) + "}"
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type_name(a) for a in get_args(annotation))
    if get_origin(annotation) in (list, tuple):
        return f"list of {_type_name(get_args(annotation)[0])}"
    return {type(None): "null"}.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _read_arguments(argv: list[str]) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--key v1 v2` (a list) and bare `--key` (true)."""
    values: dict[str, list] = {}
    open_key = None  # takes the words that follow
    for word in argv:
        if open_key and not word.startswith("--"):
            values[open_key].append(_scalar(word))
            continue
        if not word.startswith("--") or len(word) < 3:
            raise UsageError(f"unexpected argument {word!r}: options have the form --key value (see --help)")
        key, equals, value = word[2:].partition("=")
        if key in values:
            raise UsageError(f"--{key} is given twice")
        values[key] = [_scalar(value)] if equals else []
        open_key = None if equals else key
    return {key: (given or [True])[0] if len(given) < 2 else given for key, given in values.items()}


def _scalar(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def _set(values: dict, schema: type[Config], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    schemas = [schema]
    for name in sections:
        fields = [s.model_fields[name] for s in schemas if name in s.model_fields]
        schemas = [section for field in fields for section in _sections(field.annotation)]
        if not schemas:
            raise UsageError(f"unknown key --{dotted}{_hint(schema, dotted, _leaves(schema))}")
        if isinstance(values.get(name), str):  # a section given in its short form
            values[name] = schemas[0].model_validate(values[name]).model_dump(exclude_unset=True)
        if values.get(name) is None:  # also where the file turns the section off
            values[name] = {}
        values = values[name]
    fields = [s.model_fields[last] for s in schemas if last in s.model_fields]
    if not fields:
        valid = [key for s in schemas for key in _leaves(s, dotted[: -len(last)])]
        raise UsageError(f"unknown key --{dotted}{_hint(schema, dotted, valid)}")
    if get_origin(fields[0].annotation) is list and not isinstance(value, list):
        value = [value]
    if isinstance(values.get(last), dict) and isinstance(value, str):
        (section,) = _sections(fields[0].annotation)
        value = values[last] | section.model_validate(value).model_dump(exclude_unset=True)
    values[last] = value


def _hint(schema: type[Config], key: str, valid: Iterable[str]) -> str:
    """What to write in place of a key that there is not."""
    if key in schema.renamed:
        return f": it is now {schema.renamed[key]}"
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else "; --help lists the valid keys"


def _path(schema: type[Config], location: tuple) -> list:
    """Where an error is, as the key is written: without the name of the union's member that pydantic puts in."""
    path, schemas, parts = [], [schema], list(location)
    while parts:
        path.append(parts.pop(0))
        fields = [s.model_fields[path[-1]] for s in schemas if path[-1] in s.model_fields]
        schemas = [section for field in fields for section in _sections(field.annotation)]
        if len(schemas) > 1 and parts:
            chosen = parts.pop(0)
            tag = str(fields[0].discriminator)
            schemas = [s for s in schemas if chosen in get_args(s.model_fields[tag].annotation)]
    return path


def _explain(schema: type[Config], error: Any) -> str:
    key = ".".join(map(str, _path(schema, error["loc"])))
    if error["type"] == "extra_forbidden":
        if key in _leaves(schema):
            return f"{key} is a key of another choice than this one's (--help lists which keys go together)"
        return f"unknown key {key}{_hint(schema, key, _leaves(schema))}"
    if error["type"] == "missing":
        return f"{key} is required (give it as --{key} VALUE)"
    if error["type"] == "union_tag_invalid":
        old = f"{key}.{error['ctx']['discriminator'][1:-1]}: {error['ctx']['tag']}"
        if old in schema.renamed:
            return f"unknown {old}{_hint(schema, old, ())}"
    if error["type"] == "model_type":
        return f"{key} = {error['input']!r}: it must be a section of keys (--help lists them)"
    message = error["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    if not key:
        return message
    given = "" if isinstance(error["input"], dict) else f" = {error['input']!r}"
    return f"{key}{given}: {message}"
