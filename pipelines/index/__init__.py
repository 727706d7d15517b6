"""Which images there are, and with which labels: folders, tar shards and Parquet files as arrays of names and sizes.

May import: bad_files.
"""
