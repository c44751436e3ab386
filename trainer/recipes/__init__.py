"""One file per model family; this directory is the registry of recipes.

A family file holds `config.json`s as they were published, and `RECIPES`: a line of numbers for each size, or one function per
run. Runs say in their docstrings what one GPU holds. The arithmetic, in bytes: a parameter is 2 (bf16) and its gradient 4 (fp32),
over TP and PP; its optimizer state 12 (fp32 value and two moments), over data-parallel and context-parallel ranks too; a layer
keeps 30 to 38 × hidden size for each token of a micro-batch, over TP and CP; logits and what the loss makes of them 4 ×
vocabulary size per token. With adapters a parameter is its 2 alone, one of an adapter 18, and layers keep as much as without:
the adapters ask for what the frozen weights do not. `mbtrain show` says it in full, for any settings.

    from trainer.recipes import llama32_1b
    config = llama32_1b.pretrain_config()
"""

from __future__ import annotations

import pkgutil
from difflib import get_close_matches
from importlib import import_module

from formats.errors import UserError
from trainer.recipe import Recipe


def every() -> dict[str, Recipe]:
    """Return all recipes by name. No recipe has the name of a file here: an imported module would hide it."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {recipe.name: recipe for file in files for recipe in import_module(f"{__name__}.{file}").RECIPES}


def find(name: str) -> Recipe:
    """Return the recipe of a name. Raises UserError with the nearest name for an unknown one."""
    recipes = every()
    if name not in recipes:
        near = get_close_matches(name, recipes, 1)
        hint = f"did you mean `{near[0]}`?" if near else "`mbtrain recipes` lists them"
        raise UserError(f"there is no recipe `{name}`", hint=hint)
    return recipes[name]


def __getattr__(name: str) -> Recipe:
    """Return a recipe for `from trainer.recipes import llama32_1b`."""
    if name.startswith("_") or name not in (recipes := every()):
        raise AttributeError(f"module `{__name__}` has no recipe `{name}`")
    return recipes[name]


def __dir__() -> list[str]:
    return [*globals(), *every()]
