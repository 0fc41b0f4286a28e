"""From a model's name to its folder, and from the folder to exactly the named arrays it must hold.

Owns names, downloads, file formats and checks. Refuses to know how a model computes.
"""
