"""What a view of an image is: crop, operations and mixing, decided before a pixel is read.

May import: bad_files, index.
"""
