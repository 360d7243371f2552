"""What keeps the four lessons safe, one job a file. No file here imports a lesson.

    errors      how a script refuses: one line, exit code 2; flags with bounds
    files       JSON and JSON lines in, whole files out, logs that survive a kill
    ranks       several processes as one, under torchrun
    checkpoint  model folders and adapters on disk, and what is refused in them
    examples    training examples, out of files of any size
    run         a training run's folder, checkpoints, log and signals
"""
