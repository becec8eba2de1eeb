"""Without the triton that the simulators know nothing here is collected but what is for a GPU."""
from versions import simulable

if not simulable():
    collect_ignore_glob = ["test_[!g]*.py"]
