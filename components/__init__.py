"""One thin Kubeflow container component per stage."""
