"""Distance of two models' attention maps. Imports backend.py and tiles.py only."""
