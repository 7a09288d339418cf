"""What the prepare.py scripts share. It belongs to a checkout and is not installed with the project.

The standard library is enough for it: data can be prepared before anything is installed.
"""
