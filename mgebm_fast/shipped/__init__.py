"""Small trained models, one folder each: float16 weights, the run's configuration and a card.

`mgebm models` lists them; a command that takes a run takes their names, and so does `mgebm_fast.load`.
`scripts/ship_model.py` makes the folders.
"""
