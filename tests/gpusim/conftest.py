"""Without the triton that the simulators know nothing here is collected but what is for a GPU and the CUDA sources'."""
from versions import simulable

if not simulable():
    collect_ignore_glob = ["test_[!cg]*.py"]
