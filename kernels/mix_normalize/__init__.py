"""uint8 images to normalised, erased and mixed input. Imports backend.py only."""
