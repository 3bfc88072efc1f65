"""Evaluation: accuracy, nearest neighbours, linear classifiers, reconstruction."""
