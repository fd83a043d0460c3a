"""The API for administrators, as docs/admin-api.yaml describes it."""

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.lab.client import Client

PATH = "/_synapse/sticky/admin/v1"
FILE = Path(__file__).parents[2] / "docs" / "admin-api.yaml"


@cache
def description() -> Any:
    """The OpenAPI file."""
    return yaml.safe_load(FILE.read_text())


def check(path: str, body: Any, *, method: str = "get") -> None:
    """Raises ``jsonschema.ValidationError`` if the answer is not as it is described."""
    parts = path.partition("?")[0].split("/")
    (found,) = [
        template
        for template in description()["paths"]
        if len(template.split("/")) == len(parts) + 1
        and all(
            mine == part or mine.startswith("{")
            for mine, part in zip(template.split("/")[1:], parts, strict=True)
        )
    ]
    answer = description()["paths"][found][method]["responses"]["200"]
    schema = answer["content"]["application/json"]["schema"]
    whole = {**schema, "components": description()["components"]}
    jsonschema.Draft202012Validator(whole).validate(body)


def ask(admin: Client, path: str, **query: Any) -> Any:
    """An administrator's GET. The answer is as it is described."""
    body = admin.request("GET", f"{PATH}/{path}", **query)
    check(path, body)
    return body
