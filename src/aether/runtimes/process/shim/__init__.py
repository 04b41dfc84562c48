"""The keeper of one instance: a small program of its own that outlives the server.

The server starts it as `python -I -S -E` with this folder's parent on the path, so the modules here import the
standard library and each other, nothing else, and only light parts of it: one keeper runs per instance.
"""
