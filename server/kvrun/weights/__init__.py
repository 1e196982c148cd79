"""Checkpoints, and which part of them each rank holds."""

import kvrun.weights.parts  # noqa: F401  (registers how every kind of mixer is cut)
