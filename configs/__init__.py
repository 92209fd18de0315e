"""Recipes: YAML files for `--config`, by name."""
