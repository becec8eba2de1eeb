"""What the launchers of every device do with tensors."""
from collections.abc import Callable
from dataclasses import dataclass

from torch.utils.weak import WeakTensorKeyDictionary

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
    """How backward makes a tensor again that is not kept: make(*ingredients), all of which are kept anyway."""
    make: Callable
    ingredients: tuple
    version: int  # of the tensor: once it is changed, the recipe gives another one


_recipes = WeakTensorKeyDictionary()


def give_recipe(tensor, make, *ingredients):
    _recipes[tensor] = Recipe(make, ingredients, tensor._version)


def recipe_of(tensor):
    """The tensor's own, or else to keep it."""
    recipe = _recipes.get(tensor)
    if recipe is None or recipe.version != tensor._version:
        return Recipe(lambda x: x, (tensor,), tensor._version)
    return recipe
