"""The flow, from the affine map up: see `flow.py` for the whole and `deep.py` for the part with memory.

What that part remembers is in `context.py`, and what happens when its window is full in `window.py`.
"""
