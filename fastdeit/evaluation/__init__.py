"""What a model is worth: accuracy and calibration by head, confusion, and the tables and charts that show them.

May import: checkpoint, config, distributed, errors, models.
"""
