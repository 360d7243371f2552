"""What keeps the four lessons safe, one job a file. No file here imports a lesson.

    errors      how a script refuses: one line, exit code 2; flags with bounds
    files       JSON and JSON lines in, whole files out, logs that survive a kill
    ranks       several processes as one, under torchrun
    tasks       task folders on disk -> rows that are known to be whole
    metrics     vectors -> scores, each as mteb computes it
    blocks      a million texts through an embedder
    cache       vectors on disk, for the rerun
    table       averages, the paper's figures, the table
    progress    how far a long loop has come
"""
