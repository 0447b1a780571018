"""The CRDs' schemas: strict about unknown keys, with their defaults applied, as the API server does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]


def documents(text: str) -> list[Object]:
    """The objects of a YAML text."""
    return [d for d in yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if d]


def part(whole: Object, key: str) -> Any:
    """What lies under a key; an empty object where nothing does, or null."""
    return whole.get(key) or {}


def listed(whole: Object, key: str) -> list[Any]:
    """What is listed under a key; nothing where it is not there, or null."""
    return whole.get(key) or []


def load_schemas(folder: Path) -> dict[str, Object]:
    """By kind: the v1 schema of each CRD in a folder, strict about unknown keys."""
    schemas = {}
    for path in sorted(Path(folder).glob("*.yaml")):
        for crd in documents(path.read_text()):
            version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
            schemas[crd["spec"]["names"]["kind"]] = _strict(version["schema"]["openAPIV3Schema"])
    return schemas


def _strict(schema: Any) -> Any:
    """No unknown keys wherever keys are listed; formats that JSON schema has not become their types."""
    if isinstance(schema, list):
        return [_strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    made = {k: _strict_value(k, v) for k, v in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
        made.pop("anyOf", None)
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def _strict_value(key: str, value: Any) -> Any:
    """The value of a schema's key: names of properties, defaults and choices are no schemas."""
    if key == "properties":
        return {name: _strict(inner) for name, inner in value.items()}
    return value if key in ("default", "enum") else _strict(value)


def _defaulted(value: Any, schema: Object) -> Any:
    """The value without nulls that the API server drops, and with the schema's defaults."""
    if isinstance(value, list):
        return [_defaulted(v, part(schema, "items")) for v in value]
    return _defaulted_object(value, schema) if isinstance(value, dict) else value


def _defaulted_object(value: Object, schema: Object) -> Object:
    inner, others = schema.get("properties", {}), schema.get("additionalProperties")
    there = {k: v for k, v in value.items() if v is not None or inner.get(k, {}).get("nullable")}
    made = {k: _defaulted(v, inner.get(k) or (others if isinstance(others, dict) else {})) for k, v in there.items()}
    return made | _defaults(inner, there)


def _defaults(properties: Object, there: Object) -> Object:
    """Copies of the defaults of those properties that are not there."""
    missing = {name: sub for name, sub in properties.items() if name not in there}
    return {name: copy.deepcopy(sub["default"]) for name, sub in missing.items() if "default" in sub}


def validate(thing: Object, schemas: dict[str, Object]) -> list[str]:
    """What the CRD's schema has against an object of ray.io; nothing for other kinds."""
    import jsonschema

    ours = str(thing.get("apiVersion", "")).startswith("ray.io/")
    schema = schemas.get(thing.get("kind", "")) if ours else None
    if schema is None:
        return []
    schema = {**schema, "properties": {**schema["properties"], "metadata": {"type": "object"}}}
    errors = jsonschema.Draft202012Validator(schema).iter_errors(_defaulted(thing, schema))
    return [f"{'.'.join(map(str, e.absolute_path)) or 'the object'}: {e.message[:200]}" for e in errors]
