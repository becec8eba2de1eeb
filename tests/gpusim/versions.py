"""Which triton the simulators know: they reach into its private interfaces."""
import importlib.metadata
import importlib.util

KNOWN = "3.9."


def simulable():
    """Whether the installed triton is one of them."""
    return importlib.util.find_spec("triton") is not None and importlib.metadata.version("triton").startswith(KNOWN)
