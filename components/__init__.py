"""One container component for Kubeflow per stage: typed inputs, one command, typed outputs.

The command is the same `vitpipe run STAGE` that DVC calls, in an image of this project that does not contain
kfp. KFP replaces `{{$}}` by the executor input, a JSON text with the parameters and the locations of the
artifacts, which vitpipe/stages/executor.py reads.

All components have the same parameters:

    recipe, profile     names of a recipe and of a profile (size)
    overrides           `section.key=value`, for every stage of the run
    stage_overrides     `section.key=value` of this stage and those upstream; other stages stay cached
    code_digest         of the code of this stage: KFP's cache does not see the content of an image
    data_digest         of the raw data: KFP's cache does not see the content of a mounted volume

Outputs: `out`, the stage's folder with its card.json, and `metrics`. An input that defaults to None is left
unconnected in a recipe without a stage that provides it.
"""

# No module of this folder may import `annotations` from `__future__`: kfp reads the annotations as objects,
# not as strings.
