"""Training methods, found by folder: `<name>/config.py` has the options (`CONFIG`), `<name>/method.py` the
networks, losses and hooks (`METHOD`). The interface is `method.py`.
"""
