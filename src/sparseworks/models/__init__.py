"""How a model is built: the 2-D view of any layer, repeated blocks, calibration, the zoo."""
