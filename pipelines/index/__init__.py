"""Which images there are, with which labels: folders, tar shards and Parquet files as arrays of names, labels and sizes.

May import: bad_files.
"""
