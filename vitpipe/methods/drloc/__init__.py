"""Dense relative localisation: a classifier that also tells how far apart cells of its last grid lie."""
