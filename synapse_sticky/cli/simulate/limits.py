"""The limits that are played, from a homeserver.yaml or a file with the module's options alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from synapse_sticky.cli.simulate.arrivals import UnusableError

_MODULE = "synapse_sticky.StickyEventsModule"


def read_limits(path: str) -> Any:
    """The ``FederationConfig`` in the file.

    Raises:
        UnusableError: the file cannot be read, or Synapse would refuse what is in it.
    """
    from synapse.module_api.errors import ConfigError

    from synapse_sticky.config import parse

    try:
        found: Any = yaml.safe_load(Path(path).read_text())
        return parse(_options_of(found)).federation
    except (OSError, UnicodeDecodeError) as e:
        raise UnusableError(f"{path} cannot be read: {e}") from None
    except yaml.YAMLError as e:
        raise UnusableError(f"{path} is no YAML: {e}") from None
    except (ConfigError, UnusableError) as e:
        raise UnusableError(f"{path}: {getattr(e, 'msg', e)}") from None


def _options_of(found: Any) -> Any:
    if not isinstance(found, Mapping):
        raise UnusableError(
            "is neither a homeserver.yaml nor the module's options, such as\n"
            "  federation: {per_sender: {per_second: 1, burst_count: 30}}"
        )
    if "modules" not in found:
        if "server_name" in found:
            raise UnusableError(f"{_MODULE} is not listed under `modules:`")
        return found
    for module in found["modules"] or ():
        if isinstance(module, Mapping) and module.get("module") == _MODULE:
            return module.get("config")
    raise UnusableError(f"{_MODULE} is not listed under `modules:`")
