"""The attention of any model on fastdeit.kernels.attention: timm's, torchvision's, open_clip's, transformers', yours.

May import the operations' api.py; imports the libraries only when it is called.
"""
