"""Plain vision transformers, with a class token or with SelfPatch's aggregation module."""
