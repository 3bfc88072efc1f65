"""The graph for Kubeflow: reproduce one recipe, compile, run locally, submit."""
