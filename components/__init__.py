"""One thin Kubeflow component per stage: typed inputs, one command, typed outputs.

Every file is one container component. Its command is the `vitpipe run STAGE` that DVC calls too, in an image
of this project that holds no kfp; `{{$}}`, the executor input, tells it where artifacts lie
(vitpipe/stages/executor.py).

All components have the same parameters:

    recipe, profile     which recipe at which size
    overrides           `section.key=value`, given to every stage of the run
    stage_overrides     `section.key=value` of this stage and those before it; other stages stay cached
    code_digest         of the code that decides this stage: Kubeflow's cache does not see what an image holds
    data_digest         of the raw data: Kubeflow's cache does not see what a mounted volume holds

Outputs: `out`, the stage's folder with its card.json, and `metrics`. An input that defaults to None is left
out of the graph of a recipe that has no stage to feed it. kfp reads the annotations as objects, so these
files must not import `annotations` from `__future__`.
"""
