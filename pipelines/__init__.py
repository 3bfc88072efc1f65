"""The graph for the engines: Kubeflow (compile, run locally, submit) and DVC (dvc.yaml)."""
