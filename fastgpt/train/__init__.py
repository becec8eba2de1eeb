"""Training: text to tokens to a checkpoint, for `fastgpt train` and for `Trainer(model, data, TrainConfig()).run()`."""
import importlib

_EXPORTS = {"Result": "trainer", "TokenData": "data", "TrainConfig": "config", "Trainer": "trainer"}
__all__ = ["Result", "TokenData", "TrainConfig", "Trainer"]


def __getattr__(name):
    """Imports a public name at its first use: the command line's help needs the settings, not torch."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"fastgpt.train.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'fastgpt.train' has no attribute {name!r}")
