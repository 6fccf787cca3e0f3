import json
from pathlib import Path

import jsonschema
import pytest

from harness import documents

SCHEMAS = Path(documents.__file__).parent / "schemas"


@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_the_schema_in_the_repository_is_that_of_the_code(name: str) -> None:
    # After a wanted change: python -m harness.documents
    assert json.loads((SCHEMAS / f"{name}.json").read_text()) == documents.json_schema(name)


@pytest.mark.parametrize("name", documents.DOCUMENTS)
def test_schemas_are_schemas_and_closed(name: str) -> None:
    schema = documents.json_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["additionalProperties"] is False
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({}, schema) if name != "show" else jsonschema.validate({"x": 1}, schema)
