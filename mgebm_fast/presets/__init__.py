"""Presets of training runs, one TOML file each; `mgebm_fast.learning.load_preset` reads them."""
