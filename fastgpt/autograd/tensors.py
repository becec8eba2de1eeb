"""What the launchers of every device do with tensors."""
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch._C._autograd import _top_saved_tensors_default_hooks

from fastgpt.memory import LARGE

MAX_HEAD_SIZE = 256  # of the attention kernels


def dense(*tensors):
    """Contiguous tensors of the same values; None stays None."""
    return tuple(t if t is None else t.contiguous() for t in tensors)


def rows_of(x):
    """(rows, columns) of a contiguous tensor seen as a matrix over its last dimension."""
    columns = x.shape[-1]
    return x.numel() // columns if columns else 0, columns


@dataclass(frozen=True)
class Recipe:
    """How backward makes a tensor again that is not kept: make(*ingredients), all of which are kept anyway.

    versions: of the tensor and its ingredients, since a change of one spoils it (but one through `.data`, which nobody sees).
    """
    make: Callable
    ingredients: tuple
    versions: tuple

    def __reduce__(self):
        """A tensor that is saved or copied goes without it, in a file that weights_only reads."""
        return OrderedDict, ()


def give_recipe(tensor, make, *ingredients):
    """To a large tensor: to a small one it is not worth its microseconds. The ingredients are taken without their history,
    which may lead to the tensor: it would never die."""
    if tensor.nbytes >= LARGE:
        ingredients = tuple(t if t is None else t.detach() for t in ingredients)
        tensor.fastgpt_recipe = Recipe(make, ingredients, _versions(tensor, *ingredients))


def recipe_of(tensor):
    """(make, ingredients): the tensor's own, or else to keep it. To keep it also for those who look at what is kept
    (checkpointing, offloading): they may run forward once more, with another tensor in this one's place, and want the same."""
    recipe = getattr(tensor, "fastgpt_recipe", None)
    if type(recipe) is not Recipe or _top_saved_tensors_default_hooks(True) or (
            recipe.versions != _versions(tensor, *recipe.ingredients)):
        return _itself, (tensor,)
    return recipe.make, recipe.ingredients


def _itself(tensor):
    return tensor


def _versions(*tensors):
    return tuple(t._version for t in tensors if t is not None)
