"""Which images there are: names, labels and sizes of class folders, tar shards and Parquet files, as arrays.

May import: bad_files.
"""
