"""Which images a step has and what their views are: order, crop, operations, mixing, all drawn before decoding.

May import: bad_files.
"""
