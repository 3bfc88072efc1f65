"""One container component for Kubeflow per stage: typed inputs, one command, typed outputs.

The command is the same `vitpipe run STAGE` that DVC calls, in an image of this project that does not contain
kfp. KFP replaces `{{$}}` by the executor input, a JSON text with the parameters and the locations of the
artifacts, which vitpipe/stages/executor.py reads.
"""
