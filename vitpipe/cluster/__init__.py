"""Stages on several nodes: a Kubeflow TrainJob made, followed and taken down for one stage of a run."""
