"""CLIP's image towers as frozen teachers: network, and files as people have them."""
