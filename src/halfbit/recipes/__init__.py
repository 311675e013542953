"""Recipes by name: one TOML file each. Copy one and change it; `halfbit compress --recipe my.toml` takes it."""
