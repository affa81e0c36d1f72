"""The flow, from the affine map up: see `flow.py` for the whole and `deep.py` for the part with memory."""
