"""All properties that an attention is tested for, in one table. Refuses to define any."""

from collections.abc import Mapping

from harness.errors import UsageError, did_you_mean
from harness.identities import IDENTITIES
from harness.laws import MEMORY, Property
from harness.leaks import LEAKS
from harness.metamorphic import PAIRS, agreement
from harness.probes import PROBES

__all__ = ["MEMORY", "PROPERTIES", "Property", "agreement", "property_for"]

PROPERTIES: tuple[Property, ...] = (*PROBES, *LEAKS, *PAIRS, *IDENTITIES)
_BY_NAME: Mapping[str, Property] = {found.name: found for found in PROPERTIES}


def property_for(name: str) -> Property:
    """The property of that name. Raises `UsageError` naming the nearest one."""
    if name not in _BY_NAME:
        raise UsageError(f"there is no property `{name}`", hint=did_you_mean(name, list(_BY_NAME)))
    return _BY_NAME[name]
