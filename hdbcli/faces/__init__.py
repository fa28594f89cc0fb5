"""Faces: from a photo to an aligned crop, and from a crop to an embedding.

`photo` reads, detects and aligns; `embedding` says whether two pictures show one person. The
weights of both networks lie in `assets`. May import registry.
"""
