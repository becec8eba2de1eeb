"""What the launchers of every device do with tensors."""
from collections.abc import Callable
from dataclasses import dataclass

from torch._C._autograd import _top_saved_tensors_default_hooks
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
    """How backward makes a tensor again that is not kept: make(*ingredients), all of which are kept anyway.

    versions: of the tensor and its ingredients, since a change of one spoils it (but one through `.data`, which nobody sees).
    """
    make: Callable
    ingredients: tuple
    versions: tuple = ()


_recipes = WeakTensorKeyDictionary()


def give_recipe(tensor, make, *ingredients):
    """The ingredients are taken without their history: it may lead to the tensor, which would then never die."""
    ingredients = tuple(t if t is None else t.detach() for t in ingredients)
    _recipes[tensor] = Recipe(make, ingredients, _versions(tensor, *ingredients))


def recipe_of(tensor):
    """The tensor's own, or else to keep it: also for those who look at what is kept (checkpointing, offloading), as they may
    run forward once more, with another tensor in this one's place, and want the same kept."""
    recipe = None if _top_saved_tensors_default_hooks(True) else _recipes.get(tensor)
    if recipe is None or recipe.versions != _versions(tensor, *recipe.ingredients):
        return Recipe(lambda x: x, (tensor,))
    return recipe


def _versions(*tensors):
    return tuple(t._version for t in tensors if t is not None)
