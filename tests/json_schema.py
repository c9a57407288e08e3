"""A checker for the part of JSON Schema (draft 2020-12) that OpenAPI documents of ours use; the rest is an error."""

from __future__ import annotations

from typing import Any

_KNOWN = {
    "$ref", "additionalProperties", "anyOf", "const", "default", "description", "enum", "format", "items", "maxItems",
    "minItems", "prefixItems", "properties", "required", "title", "type",
}  # fmt: skip
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "integer": (int,), "number": (int, float),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip
Schema = dict[str, Any]


def resolve(document: Schema, schema: Schema) -> Schema:
    """Follows `$ref` within the document. Raises `KeyError` where it leads nowhere."""
    while "$ref" in schema:
        start, *path = schema["$ref"].split("/")
        assert start == "#", schema["$ref"]
        schema = document
        for name in path:
            schema = schema[name]
    return schema


def faults(document: Schema, schema: Schema, value: Any, at: str = "$") -> list[str]:
    """Returns where `value` doesn't fit, one sentence each."""
    schema = resolve(document, schema)
    assert schema.keys() <= _KNOWN, f"{at}: this checker doesn't know {schema.keys() - _KNOWN}"
    if "anyOf" in schema:
        tried = [faults(document, option, value, at) for option in schema["anyOf"]]
        return [] if [] in tried else min(tried, key=len)
    if "enum" in schema and value not in schema["enum"]:
        return [f"{at}: {value!r} is none of {schema['enum']}"]
    kind = schema.get("type")
    if kind is not None:
        fits = isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
        if not fits:
            return [f"{at}: {value!r} is no {kind}"]
    if isinstance(value, dict):
        return _object_faults(document, schema, value, at)
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        found = [fault for at_, (one, item) in enumerate(zip(first, value, strict=False))
                 for fault in faults(document, one, item, f"{at}[{at_}]")]  # fmt: skip
        rest = schema.get("items", {})
        if rest is False:
            return found + ([f"{at}: {len(value)} items"] if len(value) > len(first) else [])
        for number, item in enumerate(value[len(first) :], len(first)):
            found += faults(document, rest, item, f"{at}[{number}]")
        return found
    return []


def _object_faults(document: Schema, schema: Schema, value: dict[str, Any], at: str) -> list[str]:
    found = [f"{at}: {name} is missing" for name in schema.get("required", []) if name not in value]
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, inner in value.items():
        if name in properties:
            found += faults(document, properties[name], inner, f"{at}.{name}")
        elif others is False:
            found.append(f"{at}: {name} is unknown")
        elif isinstance(others, dict):
            found += faults(document, others, inner, f"{at}.{name}")
    return found


def references(node: Any) -> set[str]:
    """All `$ref` below `node`."""
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(references, node.values()))
    return set().union(*map(references, node)) if isinstance(node, list) else set()


def check_document(document: Schema) -> None:
    """Asserts what OpenAPI 3.1 demands of a document such as ours (specification, sections 4.8.1 to 4.8.17)."""
    assert document["openapi"].startswith("3.1.")
    assert set(document) <= {"openapi", "info", "paths", "components"}
    assert document["info"]["title"]
    assert document["info"]["version"]
    for reference in references(document):
        resolve(document, {"$ref": reference})
    for path, item in document["paths"].items():
        assert path.startswith("/")
        named = {part[1:-1] for part in path.split("/") if part.startswith("{")}
        for method, operation in item.items():
            assert method in {"get", "post", "put", "patch", "delete"}
            assert operation["summary"]
            parameters = operation.get("parameters", [])
            assert {entry["name"] for entry in parameters if entry["in"] == "path"} == named, path
            assert all(entry["required"] for entry in parameters if entry["in"] == "path")
            assert len({(entry["in"], entry["name"]) for entry in parameters}) == len(parameters)
            assert all("schema" in entry for entry in parameters)
            assert operation["responses"], path
            for status, response in operation["responses"].items():
                assert 100 <= int(status) <= 599
                assert response["description"]
                assert all("schema" in content for content in response.get("content", {}).values())
            if "requestBody" in operation:
                assert method != "get"
                assert operation["requestBody"]["content"]
    for name, schema in document.get("components", {}).get("schemas", {}).items():
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_"), name
        assert schema.keys() <= _KNOWN, name
        assert set(schema.get("required", [])) <= set(schema.get("properties", {}))
