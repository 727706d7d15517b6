"""The attention of other libraries' models on fastdeit.kernels.attention: timm, transformers.

May import the operations' api.py; imports the libraries only when it is called.
"""
