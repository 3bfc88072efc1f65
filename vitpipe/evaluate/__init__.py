"""What it is worth: accuracy, nearest neighbours, linear classifiers, reconstruction."""
