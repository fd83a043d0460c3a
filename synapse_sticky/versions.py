"""Which version of Synapse is installed. Nothing of Synapse is imported to tell."""

from importlib.metadata import PackageNotFoundError, version


def synapse_version() -> str:
    """The version of the Synapse that is installed, as its package has it."""
    try:
        return version("matrix-synapse")
    except PackageNotFoundError:
        return "of an unknown version"
