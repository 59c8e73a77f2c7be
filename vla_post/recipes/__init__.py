"""Named runs: a recipe is a whole run as one typed value. A larger change is a new recipe."""

from vla_post.recipes.demo import DEMOS, DemoRecipe, demo_pixels, demo_state, recipe

__all__ = ["DEMOS", "DemoRecipe", "demo_pixels", "demo_state", "recipe"]
