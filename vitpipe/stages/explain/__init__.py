"""Stage `explain`: pictures of what a classifier looks at."""
